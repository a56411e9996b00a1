"""Turn the entries of a journal into MLflow's: each kind by a function of its own.

Entries may be sent again, when an acknowledgement was lost: none of them is then there twice.
"""

import importlib.metadata
import json
import logging
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.recipe.schema import Recipe
from pipeline.tracking.journal import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

# Longest side, in pixels, of the pictures that MLflow's overview of a run shows.
_THUMBNAIL_PIXELS = 256
# Of a metric that MLflow shows with a registered model.
_RESULT_PREFIXES = ("val/", "interp/")
_PYFUNC_SCRIPT = Path(__file__).with_name("pyfunc.py")


@dataclass(frozen=True)
class _Delivery:
    """Entries of one kind, and where they go."""

    client: "MlflowClient"
    run: str
    """MLflow's id of the run."""
    folder: Path
    """Of the run."""
    recipe: Recipe
    records: list[Record]
    """The entries, at least one; only metrics, parameters and tags come several at once."""

    @property
    def first(self) -> Record:
        """The only entry of a kind that comes one by one."""
        return self.records[0]

    def existing(self, name: str) -> Path | None:
        """The path ``name`` of the run's folder; None, which is logged, if nothing is there."""
        path = self.folder / name
        if not path.exists():
            log.warning("%s is gone and stays out of MLflow's artifacts", path)
            return None
        return path


def deliver(
    client: "MlflowClient",
    run: str,
    folder: Path,
    recipe: Recipe,
    kind: str,
    records: list[Record],
) -> None:
    """Send entries of one kind to MLflow; an artifact that is gone is logged and left out.

    Args:
        client: of the store.
        run: MLflow's id of the run.
        folder: of the run.
        recipe: of the run.
        kind: of the entries, one of the journal's KINDS.
        records: the entries.

    Raises:
        Exception: what MLflow's client raises, see ``store_errors``.
    """
    _DELIVER[kind](_Delivery(client, run, folder, recipe, records))


def _metrics(delivery: _Delivery) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(record["key"], record["value"], record["timestamp"], record["step"])
        for record in delivery.records
    ]
    delivery.client.log_batch(delivery.run, metrics=metrics, synchronous=True)


def _params(delivery: _Delivery) -> None:
    from mlflow.entities import Param

    params = [Param(record["key"], record["value"]) for record in delivery.records]
    delivery.client.log_batch(delivery.run, params=params, synchronous=True)


def _tags(delivery: _Delivery) -> None:
    from mlflow.entities import RunTag

    tags = [RunTag(record["key"], record["value"]) for record in delivery.records]
    delivery.client.log_batch(delivery.run, tags=tags, synchronous=True)


def _status(delivery: _Delivery) -> None:
    status = delivery.first["value"]
    if status == "RUNNING":
        delivery.client.update_run(delivery.run, status)
    else:
        delivery.client.set_terminated(delivery.run, status, delivery.first["timestamp"])


def _dataset(delivery: _Delivery) -> None:
    """An input of the run, with its context (training or validation)."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    profile = dict(delivery.first["value"])
    name = profile.pop("name")
    digest = profile.pop("digest")
    source = json.dumps({"uri": profile.pop("source")})
    entity = Dataset(name, digest, "local", source, profile=json.dumps(profile))
    context = InputTag(MLFLOW_DATASET_CONTEXT, delivery.first["key"])
    delivery.client.log_inputs(delivery.run, datasets=[DatasetInput(entity, [context])])


def _artifact(delivery: _Delivery) -> None:
    if path := delivery.existing(delivery.first["key"]):
        delivery.client.log_artifact(delivery.run, str(path), delivery.first["value"] or None)


def _image(delivery: _Delivery) -> None:
    """A picture and its thumbnail, as ``log_image`` of MLflow writes them.

    Their names are the same when they are sent again.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
    from PIL import Image

    record = delivery.first
    path = delivery.existing(record["value"])
    if path is None:
        return
    run, key, step = delivery.run, record["key"], record["step"]
    unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{run} {key} {step}")
    name = f"{key}+step+{step}+timestamp+{record['timestamp']}+{unique}"
    with tempfile.TemporaryDirectory() as folder, Image.open(path) as image:
        shutil.copyfile(path, Path(folder, f"{name}.png"))
        image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        image.save(Path(folder, f"{name}+compressed.webp"))
        delivery.client.log_artifacts(run, folder, "images")
    delivery.client.set_tag(run, MLFLOW_LOGGED_IMAGES, "True")


def _model(delivery: _Delivery) -> None:
    """The export as a model that predicts and explains, registered under its architecture.

    The version that is registered carries the run's results as tags.
    """
    from mlflow.exceptions import MlflowException

    export = delivery.existing(delivery.first["value"])
    if export is None:
        return
    client, run, name = delivery.client, delivery.run, delivery.recipe.model.name
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        _save_pyfunc(export, model)
        client.log_artifacts(run, str(model), "model")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if client.search_model_versions(f"run_id = '{run}'"):
        return
    results = {
        key: f"{value:.6g}"
        for key, value in client.get_run(run).data.metrics.items()
        if key.startswith(_RESULT_PREFIXES)
    }
    client.create_model_version(name, f"runs:/{run}/model", run, tags=results)


def _save_pyfunc(export: Path, path: Path) -> None:
    """Write an export to ``path`` in the form that ``mlflow.pyfunc.load_model`` reads."""
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    # (B, 3, H, W)
    images = TensorSpec(np.dtype("float32"), (-1, 3, -1, -1))
    explain = ParamSpec("explain", DataType.boolean, False)
    signature = ModelSignature(inputs=Schema([images]), params=ParamSchema([explain]))
    mlflow_version = importlib.metadata.version("mlflow")
    # MLflow would derive the signature from an example; here it is given.
    warnings.filterwarnings("ignore", ".*An input example was not provided when logging the model")
    pyfunc.save_model(
        path,
        python_model=str(_PYFUNC_SCRIPT),
        artifacts={"export": str(export)},
        signature=signature,
        pip_requirements=["coda-pipeline", f"mlflow=={mlflow_version}"],
    )


_DELIVER: Mapping[str, Callable[[_Delivery], None]] = {
    "metric": _metrics,
    "param": _params,
    "tag": _tags,
    "status": _status,
    "dataset": _dataset,
    "artifact": _artifact,
    "image": _image,
    "model": _model,
}
