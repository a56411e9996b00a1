"""The journal against a real MLflow store: everything exactly once, through kills and restarts."""

import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from tracked import assert_store_equals_journal, journal, make_recipe, open_tracker, tracker_of

from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.evaluation.metrics import tracked_names
from pipeline.recipe.schema import TrackingRecipe
from pipeline.tracking import TRAINING_NAMES, sync
from pipeline.tracking.store import mlflow_client

ROOT = Path(__file__).resolve().parents[2]


def test_everything_arrives_exactly_once_in_the_default_store(empty_database, tmp_path):
    # The store to which `uri: null` points.
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    folder = tmp_path / "run"
    picture = folder / "maps.png"
    with open_tracker(make_recipe(folder, None), folder, World(), tags={"job": "17"}) as tracker:
        picture.write_bytes(b"picture")
        tracker.artifact(picture, "maps")
        for step in range(64, 64 * 21, 64):
            tracker.metrics({"train/loss": 1 / step, "train/learning_rate": 1e-3}, step)
        tracker.metrics({"train/loss": math.nan, "val/loss": math.inf, "val/top1": 0.5}, 1344)
        for layer in (0, 1):
            tracker.metrics({"interp/localisation_by_layer": 0.9 - layer / 10}, layer)
    run = assert_store_equals_journal(f"sqlite:///{tmp_path / 'mlflow.db'}", folder)
    assert run.data.params["model.args.temperature"] == "64.0"
    assert run.data.params["name"] == "run"
    assert run.data.tags["job"] == "17"
    assert run.data.tags["world_size"] == "1"
    assert {"host", "version/torch", "version/deepspeed", "version/mlflow"} <= set(run.data.tags)
    assert run.data.tags["nonfinite/train/loss"] == "nan at step 1344"
    assert run.data.tags["nonfinite/val/loss"] == "inf at step 1344"
    assert "val/loss" not in run.data.metrics
    assert run.data.metrics["val/top1"] == 0.5
    assert len(tracker.history()) == 43
    assert tracker.history()["train/loss", 640] == 1 / 640
    assert tracker.run_id == run.info.run_id
    assert not list(folder.glob("*.tmp"))
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (RuntimeError, "FAILED"),
        (KeyboardInterrupt, "KILLED"),
        (SystemExit, "KILLED"),
    ],
)
def test_run_ends_with_the_status_of_its_block(store, tmp_path, error, status):
    folder = tmp_path / "run"

    with (
        pytest.raises(error) if error else nullcontext(),
        open_tracker(make_recipe(folder, store), folder, World()) as tracker,
    ):
        assert tracker.flush()
        assert mlflow_client(store).get_run(tracker.run_id).info.status == "RUNNING"
        if error:
            raise error
    assert_store_equals_journal(store, folder, status)


@pytest.mark.parametrize(
    "name",
    ["val/nonsense", "loss", "", "val/top1@5", "val/top1/", "interp/localisation_by_layer/1"],
)
def test_unknown_metric_is_refused_before_anything_is_written(store, tmp_path, name):
    folder = tmp_path / "run"
    with (
        open_tracker(make_recipe(folder, store), folder, World()) as tracker,
        pytest.raises(ValueError, match="is not in the table of metric names"),
    ):
        tracker.metrics({"val/top1": 0.5, name: 1.0}, 1)
    assert journal(folder, "metric") == []
    assert tracker.history() == {}


def test_the_caller_may_name_the_metrics(store, tmp_path):
    folder = tmp_path / "run"
    recipe = make_recipe(folder, store)
    with open_tracker(recipe, folder, World(), names={"val/other"}) as tracker:
        tracker.metrics({"val/other": 0.5}, 1)
        with pytest.raises(ValueError, match="'val/top1' is not in the table of metric names"):
            tracker.metrics({"val/top1": 0.5}, 1)
    with tracker_of(recipe, folder, World(), names={"val/another"}) as tracker:
        tracker.metrics({"val/another": 1.0}, 1)
    assert tracker.history() == {("val/other", 1): 0.5, ("val/another", 1): 1.0}


def test_other_ranks_leave_no_trace(tmp_path):
    folder = tmp_path / "run"
    recipe = make_recipe(folder, f"sqlite:///{tmp_path / 'mlflow.db'}")
    with open_tracker(recipe, folder, World(rank=1, local_rank=1, size=2)) as tracker:
        tracker.metrics({"val/top1": 0.5}, 1)
        tracker.tags({"a": "b"})
        tracker.artifact(folder / "recipe.yaml")
        tracker.sync_to_disk()
        assert tracker.flush()
        assert tracker.run_id is None
        assert tracker.history() == {}
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "recipe.yaml"]


CHILD = """
import sys
from pathlib import Path
from pipeline.distributed import World
from pipeline.recipe.load import load
from pipeline.run_folder import RunFolder
from pipeline.tracking import open_tracker

folder = Path(sys.argv[1])
tracker = open_tracker(load(folder / "recipe.yaml"), RunFolder(folder), World())
tracker.flush()
print("sent", flush=True)
for step in range(10_000_000):
    tracker.metrics({"train/loss": 1 / (step + 1)}, step)
    if step == 2000:
        tracker.flush()
        print("sent", flush=True)
"""


def test_kill_9_and_resume_is_one_run_without_gaps_or_repeats(tmp_path):
    folder = tmp_path / "run"
    # A fresh store, whose folder and tables have to be made.
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    recipe = make_recipe(folder, uri)
    command = [sys.executable, "-c", CHILD, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "sent\n" == child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        assert child.communicate()[1] == "", "MLflow or Alembic wrote to stderr"
    run_id = (folder / "run_id").read_text()
    written = (folder / "journal.jsonl").read_bytes()
    before = len(journal(folder, "metric")) if written.endswith(b"\n") else None
    assert int((folder / "journal.offset").read_text()) > 2000 * 50
    # As if MLflow had acknowledged the first line only.
    (folder / "journal.offset").write_text(str(len(written.splitlines(keepends=True)[0])))

    with open_tracker(recipe, folder, World()) as tracker:
        assert before is None or len(tracker.history()) == before
        last = max(step for _, step in tracker.history())
        # The run is resumed from an older checkpoint.
        for step in range(1500, last + 500):
            tracker.metrics({"train/loss": 1 / (step + 1)}, step)
        assert tracker.flush(120)
    assert tracker.history() == {("train/loss", step): 1 / (step + 1) for step in range(last + 500)}
    run = assert_store_equals_journal(uri, folder)
    assert run.info.run_id == run_id
    assert [line["value"] for line in journal(folder, "status")] == [
        "RUNNING",
        "RUNNING",
        "FINISHED",
    ]


def test_torn_last_line_is_cut_off_and_its_metric_written_again(store, tmp_path):
    folder = tmp_path / "run"
    recipe = make_recipe(folder, store)
    with open_tracker(recipe, folder, World()) as tracker:
        tracker.metrics({"val/top1": 0.5}, 1)
    with open(folder / "journal.jsonl", "a") as file:
        file.write('{"kind": "metric", "key": "val/top1", "value": 0.')
    # It is left alone: a live run could be in the middle of writing it.
    assert sync(folder) == 0
    with open_tracker(recipe, folder, World()) as tracker:
        assert tracker.history() == {("val/top1", 1): 0.5}
        tracker.metrics({"val/top1": 0.75}, 2)
    assert tracker.history()["val/top1", 2] == 0.75
    assert_store_equals_journal(store, folder)


def test_damage_before_the_last_line_names_the_line(store, tmp_path):
    folder = tmp_path / "run"
    recipe = make_recipe(folder, store)
    (folder / "journal.jsonl").write_text(
        '{"kind": "tag", "key": "coda.run_key", "value": "1", "timestamp": 1}\n\0\0\n'
    )
    with pytest.raises(UserError, match=r"journal\.jsonl line 2: is not a journal entry"):
        open_tracker(recipe, folder, World())


def test_parameter_that_changed_since_the_first_start_becomes_a_tag(store, tmp_path):
    folder = tmp_path / "run"
    recipe = make_recipe(folder, store)
    open_tracker(recipe, folder, World()).close()
    longer = replace(recipe, training=replace(recipe.training, epochs=9))
    open_tracker(longer, folder, World()).close("KILLED")
    run = assert_store_equals_journal(store, folder, "KILLED")
    assert run.data.params["training.epochs"] == "2"
    assert run.data.tags["training.epochs"] == "9"


def test_every_metric_says_what_it_means_and_what_its_steps_count():
    assert all(
        meaning and steps for meaning, steps in {**TRAINING_NAMES, **tracked_names()}.values()
    )
    # The default store, see the first test.
    assert TrackingRecipe().uri is None
