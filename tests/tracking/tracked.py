"""Helpers of the tests of tracking: a run's recipe, its journal, and MLflow compared with it."""

import json
import socket
from collections import Counter
from pathlib import Path

import yaml

from pipeline import tracking
from pipeline.evaluation.metrics import tracked_names
from pipeline.recipe.load import from_dict
from pipeline.recipe.schema import Recipe
from pipeline.run_folder import RunFolder
from pipeline.tracking.journal import RUN_KEY_TAG
from pipeline.tracking.store import mlflow_client


def make_recipe(folder: Path, uri: str | None, **tracking) -> Recipe:
    """A recipe for the run in ``folder``, stored there as the training code does."""
    tree = {
        "name": folder.name,
        "runs": str(folder.parent),
        "model": {"name": "coda_resnet20", "args": {"temperature": 64.0}},
        "data": {"source": "digits", "image_size": 32},
        "training": {"epochs": 2, "global_batch_size": 64, "learning_rate": 1e-3},
        "tracking": {"uri": uri, **tracking},
    }
    recipe = from_dict(tree)
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    return recipe


def journal(folder: Path, kind: str, name: str = "journal.jsonl") -> list[dict]:
    """The records of one kind in a journal."""
    lines = (folder / name).read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def assert_store_equals_journal(uri: str, folder: Path, status: str = "FINISHED"):
    """One run in the store, and in it each journal entry exactly once; returns the run."""
    client = mlflow_client(uri)
    experiments = [found.experiment_id for found in client.search_experiments()]
    (key,) = (line["value"] for line in journal(folder, "tag") if line["key"] == RUN_KEY_TAG)
    (run,) = client.search_runs(experiments, f"tags.`{RUN_KEY_TAG}` = '{key}'")
    assert run.info.run_id == (folder / "run_id").read_text()
    assert run.info.experiment_id == (folder / "experiment_id").read_text()
    assert (run.info.run_name, run.info.status) == (folder.name, status)
    rows = Counter()
    for name in run.data.metrics:
        rows.update(
            (name, row.step, row.value, row.timestamp)
            for row in client.get_metric_history(run.info.run_id, name)
        )
    lines = [
        line
        for path in sorted(folder.glob("*.jsonl"))
        for line in journal(folder, "metric", path.name)
    ]
    assert rows == Counter(
        (line["key"], line["step"], line["value"], line["timestamp"]) for line in lines
    )
    assert len({(name, step) for name, step, *_ in rows}) == rows.total(), (
        "a step is twice in the history"
    )
    assert run.data.params == {line["key"]: line["value"] for line in journal(folder, "param")}
    tags = {key: text for key, text in run.data.tags.items() if not key.startswith("mlflow.")}
    assert tags == {line["key"]: line["value"] for line in journal(folder, "tag")}
    stored = {
        path
        for path in artifacts(client, run.info.run_id)
        if not path.startswith(("images/", "model/"))
    }
    assert stored == {
        str(Path(line["value"]) / Path(line["key"]).name) for line in journal(folder, "artifact")
    }
    assert len(list(artifacts(client, run.info.run_id, "images"))) == 2 * len(
        journal(folder, "image")
    )
    inputs = {
        tag.value: found.dataset.digest for found in run.inputs.dataset_inputs for tag in found.tags
    }
    assert inputs == {line["key"]: line["value"]["digest"] for line in journal(folder, "dataset")}
    assert int((folder / "journal.offset").read_text()) == (folder / "journal.jsonl").stat().st_size
    return run


def artifacts(client, run_id: str, folder: str | None = None):
    """Paths of all files below ``folder`` of a run's artifacts."""
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from artifacts(client, run_id, item.path)
        else:
            yield item.path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def open_tracker(recipe: Recipe, folder: Path, world, **options):
    """The tracker of the run in ``folder``, which may log all names."""
    options = {"names": tracked_names(), **options}
    return tracking.open_tracker(recipe, RunFolder(folder), world, **options)


def tracker_of(recipe: Recipe, folder: Path, world, **options):
    """The tracker of the finished run in ``folder``, which may log all names."""
    options = {"names": tracked_names(), **options}
    return tracking.tracker_of(recipe, RunFolder(folder), world, **options)
