"""Sweeps, data sets, nodes and deaths: the surroundings of a run's metrics in MLflow."""

import os
import signal
import subprocess
import sys
import time

import pytest
from tracked import assert_store_equals_journal, journal, make_recipe, open_tracker, tracker_of

from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.tracking import sync
from pipeline.tracking.store import mlflow_client


def sweep(client):
    """(runs of the sweep by name, its parent)."""
    found = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    (parent,) = [run for run in found if run.data.tags.get("coda.sweep") == "rates"]
    children = {run.info.run_name: run for run in found if run is not parent}
    assert all(
        run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in children.values()
    )
    return children, parent


def test_parent_of_a_sweep_runs_while_a_child_does_and_ends_as_the_worst(store, tmp_path):
    client, recipes = mlflow_client(store), {}
    for name in ("first", "second"):
        recipes[name] = make_recipe(tmp_path / name, store, experiment="sweep", parent="rates")
    first = open_tracker(recipes["first"], tmp_path / "first", World())
    # Both create the parent if they start at the same time.
    second = open_tracker(recipes["second"], tmp_path / "second", World())
    assert first.flush()
    assert second.flush()
    children, parent = sweep(client)
    assert set(children) == {"first", "second"}
    assert parent.info.status == "RUNNING"
    first.close("KILLED")
    assert sweep(client)[1].info.status == "RUNNING"
    second.close()
    assert sweep(client)[1].info.status == "KILLED"
    # The first is requeued.
    open_tracker(recipes["first"], tmp_path / "first", World()).close()
    children, parent = sweep(client)
    assert {run.info.status for run in (*children.values(), parent)} == {"FINISHED"}
    assert_store_equals_journal(store, tmp_path / "first")


def test_data_sets_are_inputs_and_there_once(store, tmp_path):
    folder = tmp_path / "run"
    recipe = make_recipe(folder, store)
    for _ in range(2):
        with open_tracker(recipe, folder, World()) as tracker:
            tracker.dataset(
                "training",
                "digits-train",
                tmp_path / "train.beton",
                "0123456789abcdef",
                samples=1437,
            )
            tracker.dataset(
                "validation", "digits-val", tmp_path / "val.beton", "fedcba9876543210", samples=360
            )
    # As if no acknowledgement had arrived.
    (folder / "journal.offset").write_text("0")
    sync(folder)
    inputs = assert_store_equals_journal(store, folder).inputs.dataset_inputs
    assert sorted((found.dataset.name, found.dataset.profile) for found in inputs) == [
        ("digits-train", '{"samples": 1437}'),
        ("digits-val", '{"samples": 360}'),
    ]
    assert len(journal(folder, "dataset")) == 2


def test_every_node_is_watched_by_one_process_and_goes_on_after_a_restart(
    store, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    folder = tmp_path / "run"
    recipe = make_recipe(folder, store, system_metrics=True)
    for _ in range(2):
        trackers = []
        for rank, node in ((0, "n1"), (1, "n1"), (2, "n2"), (3, "n2")):
            monkeypatch.setenv("SLURMD_NODENAME", node)
            trackers.append(
                open_tracker(recipe, folder, World(rank=rank, local_rank=rank % 2, size=4))
            )
        lines = dict.fromkeys(("n1", "n2"), 0)
        deadline = time.monotonic() + 60
        before = {name: (folder / f"system-{name}.jsonl").stat().st_size for name in lines}
        while not all(
            (folder / f"system-{name}.jsonl").stat().st_size > before[name] + 1000 for name in lines
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for tracker in reversed(trackers):
            tracker.close()
    # This also finds steps that are there twice.
    run = assert_store_equals_journal(store, folder)
    assert {name.split("/")[1] for name in run.data.metrics if name.startswith("system/")} == {
        "n1",
        "n2",
    }
    used = mlflow_client(store).get_metric_history(
        run.info.run_id, "system/n1/system_memory_usage_percentage"
    )
    assert sorted(row.step for row in used) == list(range(len(used)))
    assert all(0 < row.value < 100 for row in used)
    # An evaluation is not watched.
    with tracker_of(recipe, folder, World()) as again:
        assert again.flush()
    assert sorted(path.name for path in folder.glob("system-*.jsonl")) == [
        "system-n1.jsonl",
        "system-n2.jsonl",
    ]


LIVING = """
import sys, time
from pathlib import Path
from pipeline.distributed import World
from pipeline.recipe.load import load
from pipeline.run_folder import RunFolder
from pipeline.tracking import open_tracker

folder = RunFolder(Path(sys.argv[1]))
tracker = open_tracker(load(folder.recipe), folder, World(), names=["val/top1"])
tracker.metrics({"val/top1": 0.5}, 1)
print(tracker.flush(), flush=True)
time.sleep(600)
"""


def test_sync_tells_the_dead_from_the_living_and_a_restart_is_alive_again(store, tmp_path):
    folder = tmp_path / "run"
    recipe, client = make_recipe(folder, store), mlflow_client(store)
    with subprocess.Popen(
        [sys.executable, "-c", LIVING, folder], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "True\n"
        sync(folder)
        assert_store_equals_journal(store, folder, "RUNNING")
        child.send_signal(signal.SIGKILL)
    run_id, last = (folder / "run_id").read_text(), journal(folder, "metric")[-1]["timestamp"]
    assert sync(folder) == 1
    assert sync(folder) == 0
    run = assert_store_equals_journal(store, folder, "KILLED")
    assert run.info.end_time >= last
    assert run.info.end_time < os.stat(folder / "journal.offset").st_mtime * 1000
    tracker = open_tracker(recipe, folder, World())
    assert tracker.flush()
    assert client.get_run(run_id).info.status == "RUNNING"
    tracker.close()
    assert_store_equals_journal(store, folder)


def test_a_run_that_may_live_on_another_machine_is_not_called_dead(store, tmp_path):
    folder = tmp_path / "run"
    tracker = open_tracker(make_recipe(folder, store), folder, World(), tags={"host": "elsewhere"})
    assert tracker.flush()
    copy = tmp_path / "copy" / "run"
    copy.parent.mkdir()
    subprocess.run(["cp", "-r", folder, copy], check=True)
    sync(copy)
    assert_store_equals_journal(store, copy, "RUNNING")
    tracker.close()


def test_a_password_in_the_address_would_be_stored_with_every_run(tmp_path):
    folder = tmp_path / "run"
    recipe = make_recipe(folder, "postgresql://coda:secret@db/mlflow")
    with pytest.raises(
        UserError, match=r"postgresql://coda:...@db/mlflow holds a password.*~/.pgpass"
    ):
        open_tracker(recipe, folder, World())
