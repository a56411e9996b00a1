"""Training under DeepSpeed, which reads what is set here when it is imported."""

import os

import torch

# it imports MLflow
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
