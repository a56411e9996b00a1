"""The tracker against real MLflow stores: everything exactly once, through kills, dead servers and
restarts.
"""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tracked import assert_store_equals_journal, free_port, journal, make_recipe

from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.recipe.schema import TrackingRecipe
from pipeline.tracking import METRICS, open_tracker, sync
from pipeline.tracking.store import mlflow_client

ROOT = Path(__file__).resolve().parents[2]


def test_everything_arrives_exactly_once_in_the_default_store(empty_database, tmp_path):
    # where `uri: null` points
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

    def block():
        with open_tracker(make_recipe(folder, store), folder, World()) as tracker:
            assert tracker.flush()
            assert mlflow_client(store).get_run(tracker.run_id).info.status == "RUNNING"
            if error:
                raise error

    if error:
        pytest.raises(error, block)
    else:
        block()
    assert_store_equals_journal(store, folder, status)


@pytest.mark.parametrize(
    "name",
    ["val/nonsense", "loss", "", "val/top1@5", "val/top1/", "interp/localisation_by_layer/1"],
)
def test_unknown_metric_is_refused_before_anything_is_written(store, tmp_path, name):
    folder = tmp_path / "run"
    with (
        open_tracker(make_recipe(folder, store), folder, World()) as tracker,
        pytest.raises(ValueError),
    ):
        tracker.metrics({"val/top1": 0.5, name: 1.0}, 1)
    assert journal(folder, "metric") == []
    assert tracker.history() == {}


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


@pytest.mark.parametrize(
    "uri",
    [
        "file:./mlruns",
        "mlruns",
        "sqlite://",
        "sqlite:///",
        "http://",
        "htp://host:5000",
        "databricks",
    ],
)
def test_tracking_uri_that_cannot_work_is_refused_at_once(tmp_path, uri):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="tracking.uri .* must be sqlite:///FILE"):
        open_tracker(make_recipe(folder, uri), folder, World())


CHILD = """
import sys
from pathlib import Path
from pipeline.distributed import World
from pipeline.recipe.load import load
from pipeline.tracking import open_tracker

folder = Path(sys.argv[1])
tracker = open_tracker(load(folder / "recipe.yaml"), folder, World())
tracker.flush()
print("sent", flush=True)
for step in range(10_000_000):
    tracker.metrics({"train/loss": 1 / (step + 1)}, step)
    if step == 2000:
        tracker.flush()
        print("sent", flush=True)
"""


def test_kill_9_and_resume_is_one_run_without_gaps_or_repeats(tmp_path):
    # a fresh store: folder and tables get made
    folder, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    recipe = make_recipe(folder, uri)
    command, environment = (
        [sys.executable, "-c", CHILD, str(folder)],
        {**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "sent\n" == child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        assert child.communicate()[1] == "", "MLflow or Alembic wrote to stderr"
    run_id, acknowledged = (
        (folder / "run_id").read_text(),
        int((folder / "journal.offset").read_text()),
    )
    before = (
        len(journal(folder, "metric"))
        if (folder / "journal.jsonl").read_bytes().endswith(b"\n")
        else None
    )
    assert acknowledged > 2000 * 50
    # in doubt: all
    (folder / "journal.offset").write_text(
        str(len((folder / "journal.jsonl").read_bytes().splitlines(keepends=True)[0]))
    )

    with open_tracker(recipe, folder, World()) as tracker:
        assert before is None or len(tracker.history()) == before
        last = max(step for _, step in tracker.history())
        # resumed from an older checkpoint
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


def test_run_whose_id_was_never_written_is_found_again(store, tmp_path):
    folder = tmp_path / "run"
    recipe = make_recipe(folder, store)
    with open_tracker(recipe, folder, World()) as tracker:
        tracker.metrics({"val/top1": 0.5}, 1)
    (folder / "run_id").unlink()
    with open_tracker(recipe, folder, World()) as again:
        again.metrics({"val/top1": 0.6}, 2)
    assert again.run_id == tracker.run_id
    assert_store_equals_journal(store, folder)


def test_torn_last_line_is_cut_off_and_its_metric_written_again(store, tmp_path):
    folder = tmp_path / "run"
    recipe = make_recipe(folder, store)
    with open_tracker(recipe, folder, World()) as tracker:
        tracker.metrics({"val/top1": 0.5}, 1)
    with open(folder / "journal.jsonl", "a") as file:
        file.write('{"kind": "metric", "key": "val/top1", "value": 0.')
    # leaves it alone: a live run could be in the middle of writing it
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
    with pytest.raises(UserError, match="journal.jsonl line 2"):
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


def test_images_have_steps_and_are_there_once_even_when_sent_again(store, tmp_path):
    from PIL import Image

    folder = tmp_path / "run"
    recipe = make_recipe(folder, store)
    Image.new("RGB", (600, 300), "red").save(folder / "sheet.png")
    with open_tracker(recipe, folder, World()) as tracker:
        for step in (1, 2, 2):
            tracker.image(folder / "sheet.png", "contributions", step)
        assert tracker.flush()
    assert [(line["key"], line["step"], line["value"]) for line in journal(folder, "image")] == [
        ("contributions", 1, "sheet.png"),
        ("contributions", 2, "sheet.png"),
    ]
    client, run = mlflow_client(store), (folder / "run_id").read_text()
    sent = sorted(item.path for item in client.list_artifacts(run, "images"))
    assert len(sent) == 4
    for step in (1, 2):
        names = [
            name for name in sent if name.startswith(f"images/contributions+step+{step}+timestamp+")
        ]
        assert [Path(name).suffix for name in names] == [".webp", ".png"]
        assert max(Image.open(client.download_artifacts(run, names[0])).size) <= 256
    assert client.get_run(run).data.tags["mlflow.loggedImages"] == "True"
    # as if no acknowledgement had arrived
    (folder / "journal.offset").write_text("0")
    assert sync(folder)
    assert sorted(item.path for item in client.list_artifacts(run, "images")) == sent


def test_missing_artifact_does_not_hold_up_the_rest(store, tmp_path, caplog):
    folder = tmp_path / "run"
    with open_tracker(make_recipe(folder, store), folder, World()) as tracker:
        tracker.artifact(folder / "pruned.png")
        tracker.metrics({"val/top1": 0.5}, 1)
    assert "pruned.png is gone" in caplog.text
    assert mlflow_client(store).get_run(tracker.run_id).data.metrics == {"val/top1": 0.5}


def test_dead_server_costs_nothing_and_sync_brings_everything_later(store, tmp_path, caplog):
    folder, dead = tmp_path / "run", f"http://127.0.0.1:{free_port()}"
    recipe = make_recipe(folder, dead)
    start = time.monotonic()
    tracker = open_tracker(recipe, folder, World())
    for step in range(1000):
        tracker.metrics(
            {
                "train/loss": 1 / (step + 1),
                "val/top1": step / 1000,
                "speed/images_per_second": 10.0,
            },
            step,
        )
    trained = time.monotonic() - start
    tracker.close()
    assert trained < 3
    assert time.monotonic() - start < 30
    assert len(journal(folder, "metric")) == 3000
    assert tracker.run_id is None
    assert "training goes on" in caplog.text
    assert f"coda sync {folder}" in caplog.text
    with pytest.raises(UserError, match="sync again later"):
        sync(folder)

    moved = shutil.move(folder, tmp_path / "elsewhere")
    make_recipe(moved, store)
    assert sync(moved) == len((moved / "journal.jsonl").read_text().splitlines())
    assert_store_equals_journal(store, moved)
    assert sync(moved) == 0


def test_silent_server_slows_neither_training_nor_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = tmp_path / "run"
    with socket.socket() as black_hole:
        black_hole.bind(("127.0.0.1", 0))
        black_hole.listen()
        tracker = open_tracker(
            make_recipe(folder, f"http://127.0.0.1:{black_hole.getsockname()[1]}"), folder, World()
        )
        # the sender is in the middle of a request that nobody answers
        connection, _ = black_hole.accept()
        start = time.monotonic()
        for step in range(1000):
            tracker.metrics({"train/loss": 1.0}, step)
        assert time.monotonic() - start < 1
        assert not tracker.flush(0.5)
        assert time.monotonic() - start < 3
        # as after the death of another process, which must end all of them within 15 s
        tracker.close("KILLED")
        assert time.monotonic() - start < 10
        connection.close()
    assert len(journal(folder, "metric")) == 1000
    assert journal(folder, "status")[-1]["value"] == "KILLED"


def test_store_that_does_not_know_the_run_gets_the_whole_journal(store, empty_database, tmp_path):
    folder = tmp_path / "run"
    with open_tracker(make_recipe(folder, store), folder, World()) as tracker:
        tracker.metrics({"val/top1": 0.5}, 1)
    (tmp_path / "other").mkdir()
    other = f"sqlite:///{shutil.copy(empty_database, tmp_path / 'other' / 'mlflow.db')}"
    with open_tracker(make_recipe(folder, other), folder, World()) as again:
        again.metrics({"val/top1": 0.6}, 2)
    assert again.run_id != tracker.run_id
    assert_store_equals_journal(other, folder)


@pytest.mark.parametrize(
    ("files", "message"), [((), "no journal.jsonl"), (("journal.jsonl",), "holds no recipe.yaml")]
)
def test_sync_of_something_else_is_a_clear_error(tmp_path, files, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        sync(tmp_path)


def test_every_metric_says_what_it_means_and_what_its_steps_count():
    assert all(meaning and steps for meaning, steps in METRICS.values())
    # the default store, see the first test
    assert TrackingRecipe().uri is None
