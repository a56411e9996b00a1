"""The sender against real stores: dead, silent and forgetful ones, and ``sync`` afterwards."""

import shutil
import socket
import time
from pathlib import Path

import pytest
from PIL import Image
from tracked import assert_store_equals_journal, free_port, journal, make_recipe, open_tracker

from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.tracking import sync
from pipeline.tracking.store import mlflow_client


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
    with pytest.raises(UserError, match=r"tracking\.uri .* must be sqlite:///FILE"):
        open_tracker(make_recipe(folder, uri), folder, World())


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


def test_images_have_steps_and_are_there_once_even_when_sent_again(store, tmp_path):
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
    # As if no acknowledgement had arrived.
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
        # The sender is in the middle of a request that nobody answers.
        connection, _ = black_hole.accept()
        start = time.monotonic()
        for step in range(1000):
            tracker.metrics({"train/loss": 1.0}, step)
        assert time.monotonic() - start < 1
        assert not tracker.flush(0.5)
        assert time.monotonic() - start < 3
        # As after the death of another process, which must end all of them within 15 s.
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
