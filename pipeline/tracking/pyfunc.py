"""What ``mlflow.pyfunc.load_model`` runs: an exported network that predicts, and explains. MLflow
keeps this file with the model.

The environment that loads it needs this package, as ``import pipeline`` registers the
architectures.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from pipeline.export import load_export
from pipeline.interpret.contributions import contributions


class ExplainedClassifier(PythonModel):
    """Probabilities of all classes, and on request what every pixel contributes to the most
    probable one.
    """

    def load_context(self, context: Any) -> None:
        self.model = load_export(Path(context.artifacts["export"]))

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Of RGB images (B, 3, H, W) in [0, 1], float32.

        Returns:
            ``probabilities`` (B, C): the sigmoid of the logits. With the parameter ``explain`` also
            ``contributions`` (B, H, W): signed, to T (logit - b0) of each image's most probable
            class, summed over the channels of the encoding.
        """
        images = torch.as_tensor(model_input)
        with torch.no_grad():
            probabilities = self.model(images).sigmoid()
        found = {"probabilities": probabilities.numpy()}
        if params and params.get("explain"):
            found["contributions"] = (
                contributions(self.model, images, probabilities.argmax(1)).sum(1).numpy()
            )
        return found


set_model(ExplainedClassifier())
