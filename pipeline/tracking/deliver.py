"""How the entries of a journal become MLflow's: every kind in its own way, and none twice when it
is sent again.
"""

import importlib.metadata
import json
import logging
import shutil
import tempfile
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.recipe.schema import Recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

# pixels of the pictures that MLflow's overview of a run shows
THUMBNAIL = 256


def deliver(
    client: "MlflowClient",
    run: str,
    folder: Path,
    recipe: Recipe,
    kind: str,
    records: list[dict[str, Any]],
) -> None:
    """Send ``records``, entries of one kind, of the run in ``folder``; raises what MLflow raises."""
    from mlflow.entities import Metric, Param, RunTag

    first = records[0]
    if kind == "metric":
        metrics = [
            Metric(item["key"], item["value"], item["timestamp"], item["step"]) for item in records
        ]
        client.log_batch(run, metrics=metrics, synchronous=True)
    elif kind == "param":
        client.log_batch(
            run, params=[Param(item["key"], item["value"]) for item in records], synchronous=True
        )
    elif kind == "tag":
        client.log_batch(
            run, tags=[RunTag(item["key"], item["value"]) for item in records], synchronous=True
        )
    elif kind == "status" and first["value"] == "RUNNING":
        client.update_run(run, "RUNNING")
    elif kind == "status":
        client.set_terminated(run, first["value"], first["timestamp"])
    elif kind == "dataset":
        _deliver_dataset(client, run, first)
    elif not (path := folder / first["key" if kind == "artifact" else "value"]).exists():
        log.warning("%s is gone and stays out of MLflow's artifacts", path)
    elif kind == "artifact":
        client.log_artifact(run, str(path), first["value"] or None)
    elif kind == "image":
        _deliver_image(client, run, path, first)
    else:
        _deliver_model(client, run, path, recipe.model.name)


def _deliver_dataset(client: "MlflowClient", run: str, record: dict[str, Any]) -> None:
    """An input of the run, with its context (training or validation)."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    about = dict(record["value"])
    source = json.dumps({"uri": about.pop("source")})
    entity = Dataset(
        about.pop("name"), about.pop("digest"), "local", source, profile=json.dumps(about)
    )
    client.log_inputs(
        run, datasets=[DatasetInput(entity, [InputTag(MLFLOW_DATASET_CONTEXT, record["key"])])]
    )


def _deliver_image(client: "MlflowClient", run: str, path: Path, record: dict[str, Any]) -> None:
    """What ``log_image`` of MLflow does, but under names that are the same when it is sent again:
    nothing is there twice.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
    from PIL import Image

    key, step, timestamp = record["key"], record["step"], record["timestamp"]
    name = f"{key}+step+{step}+timestamp+{timestamp}+{uuid.uuid5(uuid.NAMESPACE_OID, f'{run} {key} {step}')}"
    with tempfile.TemporaryDirectory() as folder, Image.open(path) as image:
        shutil.copyfile(path, Path(folder, f"{name}.png"))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(Path(folder, f"{name}+compressed.webp"))
        client.log_artifacts(run, folder, "images")
    client.set_tag(run, MLFLOW_LOGGED_IMAGES, "True")


def _deliver_model(client: "MlflowClient", run: str, export: Path, name: str) -> None:
    """Log the export as a model that predicts and explains; register it as a version of ``name``
    that carries the run's results.
    """
    from mlflow import pyfunc
    from mlflow.exceptions import MlflowException
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    images = Schema([TensorSpec(np.dtype("float32"), (-1, 3, -1, -1))])
    signature = ModelSignature(
        inputs=images, params=ParamSchema([ParamSpec("explain", DataType.boolean, False)])
    )
    code = str(Path(__file__).with_name("pyfunc.py"))
    requirements = ["coda-pipeline", f"mlflow=={importlib.metadata.version('mlflow')}"]
    # the signature is given
    warnings.filterwarnings("ignore", ".*An input example was not provided when logging the model")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        artifacts = {"export": str(export)}
        pyfunc.save_model(
            model,
            python_model=code,
            artifacts=artifacts,
            signature=signature,
            pip_requirements=requirements,
        )
        client.log_artifacts(run, str(model), "model")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if not client.search_model_versions(f"run_id = '{run}'"):
        metrics = client.get_run(run).data.metrics
        results = {
            key: f"{value:.6g}"
            for key, value in metrics.items()
            if key.startswith(("val/", "interp/"))
        }
        client.create_model_version(name, f"runs:/{run}/model", run, tags=results)
