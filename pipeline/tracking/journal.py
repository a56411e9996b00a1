"""The journal of a run: the append-only file that tracking writes, and how it gets from there to MLflow."""

import importlib.metadata
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"  # its name in the run folder
URI = re.compile(r"sqlite:///(?P<file>.+)|(https?|(postgresql|mysql|mssql)(\+\w+)?)://[^/]+.*")
RUN_KEY = "coda.run_key"  # tag by which a run is found that was created just before this process died
_KEY = re.compile(r"(?=.{1,250}$)\w[\w.\- :]*(/\w[\w.\- :]*)*")  # the names MLflow takes
THUMBNAIL = 256  # pixels of the pictures that MLflow's overview of a run shows
_LIMITS = {"metric": 1000, "param": 100, "tag": 100, "artifact": 1, "image": 1, "model": 1, "status": 1}  # lines that MLflow takes at once


class Journal:
    """The append-only file and what it holds. A last line without its end, left by a kill, is cut off."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, dict[Any, Any]] = {kind: {} for kind in _LIMITS}
        self.size = 0
        self._file = open(path, "a+b")
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                self._remember(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} line {number}: is no journal entry; repair it or move the file away") from error
            self.size += len(line)
        self._file.truncate(self.size)

    def append(self, kind: str, values: Mapping[str, Any], **rest: Any) -> None:
        """One line per entry of ``values``, all in one write."""
        for key in values:
            if kind != "artifact" and not _KEY.fullmatch(key):
                raise ValueError(f"{key!r}: MLflow takes only letters, digits, blanks and _ - . / : in names")
        now = time.time_ns() // 1_000_000
        records = [{"kind": kind, "key": key, "value": value, **rest, "timestamp": now} for key, value in values.items()]
        self.size += self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self._file.flush()
        for record in records:
            self._remember(record)

    def sync_to_disk(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _remember(self, record: dict[str, Any]) -> None:
        key = (record["key"], record["step"]) if record["kind"] in ("metric", "image") else record["key"]
        self.known[record["kind"]][key] = record["value"]


class Sender:
    """Brings the journal of one run to MLflow, from the acknowledged offset on."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe, self._folder = recipe, folder
        self._client: MlflowClient | None = None
        self.offset = int(_stored(folder / "journal.offset") or 0)
        self.run_id = _stored(folder / "run_id")

    def send(self) -> Iterator[int]:
        """Send all complete lines beyond the offset; yields the number of lines of each batch that MLflow took."""
        with open(self._folder / JOURNAL, "rb") as journal:
            if self.offset >= os.fstat(journal.fileno()).st_size:
                return
            os.fsync(journal.fileno())  # what MLflow knows, no power failure takes from the journal
            if self._client is None:
                client = mlflow_client(self._recipe.tracking_uri)
                self._find_run(client, json.loads(journal.readline()))
                self._client = client
            journal.seek(self.offset)
            for kind, records, size in _batches(journal):
                self._deliver(self._client, kind, records)
                self.offset += size
                write_atomically(self._folder / "journal.offset", str(self.offset).encode())
                yield len(records)

    def _find_run(self, client: "MlflowClient", first: dict[str, Any]) -> None:
        """Take up the run of the stored id, else the one with the key in the journal's first line, else create it."""
        from mlflow.exceptions import MlflowException

        if self.run_id:
            try:
                client.get_run(self.run_id)
                return
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        self.offset = 0  # a store that does not know the run gets the whole journal
        write_atomically(self._folder / "journal.offset", b"0")
        name = self._recipe.tracking.experiment
        known, database = client.get_experiment_by_name(name), _sqlite_file(self._recipe.tracking_uri)
        # Without a location, artifacts of an SQLite store would land in the current directory.
        location = (database.parent / "mlartifacts" / name).as_uri() if database else None
        experiment = known.experiment_id if known else client.create_experiment(name, location)
        runs = client.search_runs([experiment], f"tags.`{RUN_KEY}` = '{first['value']}'", max_results=1)
        run = runs[0] if runs else client.create_run(experiment, first["timestamp"], {RUN_KEY: first["value"]}, self._recipe.name)
        self.run_id = run.info.run_id
        write_atomically(self._folder / "run_id", run.info.run_id.encode())

    def _deliver(self, client: "MlflowClient", kind: str, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run, first = str(self.run_id), records[0]
        if kind == "metric":
            metrics = [Metric(item["key"], item["value"], item["timestamp"], item["step"]) for item in records]
            client.log_batch(run, metrics=metrics, synchronous=True)
        elif kind == "param":
            client.log_batch(run, params=[Param(item["key"], item["value"]) for item in records], synchronous=True)
        elif kind == "tag":
            client.log_batch(run, tags=[RunTag(item["key"], item["value"]) for item in records], synchronous=True)
        elif kind == "status" and first["value"] == "RUNNING":
            client.update_run(run, "RUNNING")
        elif kind == "status":
            client.set_terminated(run, first["value"], first["timestamp"])
        elif not (path := self._folder / first["key" if kind == "artifact" else "value"]).exists():
            log.warning("%s is gone and stays out of MLflow's artifacts", path)
        elif kind == "artifact":
            client.log_artifact(run, str(path), first["value"] or None)
        elif kind == "image":
            _deliver_image(client, run, path, first)
        else:
            _deliver_model(client, run, path, self._recipe.model.name)


def _deliver_image(client: "MlflowClient", run: str, path: Path, record: dict[str, Any]) -> None:
    """What ``log_image`` of MLflow does, but under names that are the same when it is sent again: nothing is there twice."""
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
    """Log the export as a model that predicts and explains; register it as a version of ``name`` that carries the run's results."""
    from mlflow import pyfunc
    from mlflow.exceptions import MlflowException
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    images = Schema([TensorSpec(np.dtype("float32"), (-1, 3, -1, -1))])
    signature = ModelSignature(inputs=images, params=ParamSchema([ParamSpec("explain", DataType.boolean, False)]))
    code = str(Path(__file__).with_name("pyfunc.py"))
    requirements = ["coda-pipeline", f"mlflow=={importlib.metadata.version('mlflow')}"]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        artifacts = {"export": str(export)}
        pyfunc.save_model(model, python_model=code, artifacts=artifacts, signature=signature, pip_requirements=requirements)
        client.log_artifacts(run, str(model), "model")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if not client.search_model_versions(f"run_id = '{run}'"):
        metrics = client.get_run(run).data.metrics
        results = {key: f"{value:.6g}" for key, value in metrics.items() if key.startswith(("val/", "interp/"))}
        client.create_model_version(name, f"runs:/{run}/model", run, tags=results)


def mlflow_client(uri: str) -> "MlflowClient":
    """A quiet client that gives up early instead of after minutes; makes the folder of an SQLite file."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # compute nodes have no way out
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if database := _sqlite_file(uri):
        database.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(uri, uri)


def _batches(lines: Iterable[bytes]) -> Iterator[tuple[str, list[dict[str, Any]], int]]:
    """(kind, records, bytes) of consecutive lines of one kind, at most as many as MLflow takes at once."""
    entries = ((json.loads(line), len(line)) for line in lines if line.endswith(b"\n"))  # the last may be half written
    for kind, group in itertools.groupby(entries, key=lambda entry: entry[0]["kind"]):
        while batch := list(itertools.islice(group, _LIMITS[kind])):
            yield kind, [record for record, _ in batch], sum(size for _, size in batch)


def _sqlite_file(uri: str) -> Path | None:
    match = URI.fullmatch(uri)
    return Path(match["file"]).resolve() if match and match["file"] else None


def _stored(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
