"""The script that ``mlflow.pyfunc.load_model`` runs: an export that predicts, and explains.

MLflow keeps this file with the model. The environment that loads it needs this package, as
``import pipeline`` registers the architectures.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipeline.export import load_export
from pipeline.interpret.contributions import contributions


class ExplainedClassifier(PythonModel):
    """Probabilities of all classes, and on request the contributions of every pixel."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the export that was logged with the model."""
        self.model = load_export(Path(context.artifacts["export"]))

    def predict(
        self,
        context: PythonModelContext,
        # MLflow reads this hint, and warns of any that is more precise.
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """Classify images, and explain the most probable class of each.

        Args:
            context: unused; ``load_context`` has read it.
            model_input: RGB images (B, 3, H, W) in [0, 1], float32.
            params: with ``explain`` true, the contributions are computed.

        Returns:
            ``probabilities`` (B, C): the sigmoid of the logits. With ``explain`` also
            ``contributions`` (B, H, W): signed, to T (logit - b0) of each image's most probable
            class, summed over the channels of the encoding.
        """
        images = torch.as_tensor(model_input)
        with torch.no_grad():
            probabilities = self.model(images).sigmoid()
        found = {"probabilities": probabilities.numpy()}
        if params and params.get("explain"):
            maps = contributions(self.model, images, probabilities.argmax(1))
            found["contributions"] = maps.sum(1).numpy()
        return found


set_model(ExplainedClassifier())
