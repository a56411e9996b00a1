"""Train image classifiers that explain themselves. Importing this package registers its models in timm."""

import pipeline.models.coda
import pipeline.models.coda_resnet  # noqa: F401
