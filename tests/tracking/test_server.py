"""A real `coda serve` with a real PostgreSQL.

It is killed, slow, silent and broken, used by several training runs at once, and only by those who
may use it.
"""

import shutil
import time
import urllib.error
import urllib.request
from base64 import b64encode

import pytest
from conftest import NAME, PASSWORD
from faulty_proxy import FAULTS, FaultyProxy
from tracked import assert_store_equals_journal, free_port, journal, make_recipe, open_tracker

from pipeline.cli import main
from pipeline.distributed import World
from pipeline.tracking.store import mlflow_client


def note(tracker, first: int, last: int) -> float:
    """Log some steps; returns the seconds that it took."""
    start = time.monotonic()
    for step in range(first, last):
        tracker.metrics({"train/loss": 1 / (step + 1), "speed/images_per_second": 10.0}, step)
    return time.monotonic() - start


def catch_up(tracker) -> None:
    deadline = time.monotonic() + 120
    while not tracker.flush(10):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_broken_silent_and_late_server_costs_nothing_loses_nothing_and_doubles_nothing(
    team, tmp_path, monkeypatch
):
    # Less than a late answer takes: what is done looks as if it had failed.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    proxy, folder = FaultyProxy(team.port, "late"), tmp_path / "run"
    try:
        tracker = open_tracker(
            make_recipe(folder, proxy.uri, experiment="faults", parent="faulty"), folder, World()
        )
        for number, fault in enumerate((*FAULTS, "late", None, *FAULTS)):
            proxy.fault = fault
            assert note(tracker, 300 * number, 300 * (number + 1)) < 1
            if fault:
                assert not tracker.flush(3)
            else:
                catch_up(tracker)
        proxy.fault = None
        catch_up(tracker)
        tracker.close()
        assert set(FAULTS) <= {fault for fault, _ in proxy.seen}
        assert_store_equals_journal(team.uri, folder)
    finally:
        proxy.close()


def test_server_killed_in_the_middle_and_started_again(team, tmp_path):
    folder = tmp_path / "run"
    tracker = open_tracker(make_recipe(folder, team.uri, experiment="kills"), folder, World())
    catch_up(tracker)
    step = 0
    # The sender is at work meanwhile.
    while step < 6000:
        assert note(tracker, step, step + 100) < 1
        step += 100
    team.kill()
    assert note(tracker, step, step + 3000) < 3
    assert not tracker.flush(2)
    team.start()
    catch_up(tracker)
    tracker.close()
    assert len(journal(folder, "metric")) == 18_000
    assert_store_equals_journal(team.uri, folder)


def test_two_training_runs_at_once_are_two_whole_runs_of_one_sweep(team, two_runs):
    runs = [assert_store_equals_journal(team.uri, folder) for folder in two_runs]
    client = mlflow_client(team.uri)
    (parent,) = client.search_runs(
        [runs[0].info.experiment_id], "tags.`coda.sweep` = 'hybrid and plain'"
    )
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {parent.info.run_id}
    assert (parent.info.run_name, parent.info.status) == ("hybrid and plain", "FINISHED")
    for run in runs:
        assert {
            "val/top1",
            "interp/pixel_removal",
            "speed/device_hours",
            "speed/images_per_second",
        } <= set(run.data.metrics)
        assert any(
            name.endswith("/cpu_utilization_percentage") and name.startswith("system/")
            for name in run.data.metrics
        )
        assert {found.dataset.name for found in run.inputs.dataset_inputs} == {
            "digits-train",
            "digits-val",
        }
    versions = {
        version.run_id
        for name in ("coda_resnet20", "resnet20")
        for version in client.search_model_versions(f"name = '{name}'")
    }
    assert {run.info.run_id for run in runs} <= versions


def test_the_training_runs_were_at_once_on_postgresql(team, two_runs):
    if not team.on_postgresql:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    starts, ends = zip(
        *(
            (journal(folder, "param")[0]["timestamp"], journal(folder, "status")[-1]["timestamp"])
            for folder in two_runs
        ),
        strict=True,
    )
    assert max(starts) < min(ends)


def test_sync_of_folders_that_were_copied_to_another_machine(team, store, tmp_path, capsys):
    dead = f"http://127.0.0.1:{free_port()}"
    for name in ("one", "two"):
        folder = tmp_path / "cluster" / name
        tracker = open_tracker(make_recipe(folder, dead, experiment="copied"), folder, World())
        note(tracker, 0, 100)
        (folder / "maps.csv").write_text("1,2")
        tracker.artifact(folder / "maps.csv", "tables")
        tracker.close("FINISHED" if name == "one" else "KILLED")
    here = tmp_path / "laptop"
    shutil.copytree(tmp_path / "cluster", here)
    shutil.rmtree(tmp_path / "cluster")
    # The server that the recipes name is not reachable from here.
    assert main(["sync", str(here)]) == 2
    assert "sync again later" in capsys.readouterr().err
    assert main(["sync", str(here), f"tracking.uri={team.uri}"]) == 0
    lines = sum(
        len((here / name / "journal.jsonl").read_text().splitlines()) for name in ("one", "two")
    )
    assert capsys.readouterr().out == f"{lines} journal lines sent\n"
    assert main(["sync", str(here), f"tracking.uri={team.uri}"]) == 0
    assert capsys.readouterr().out == "0 journal lines sent\n"
    assert_store_equals_journal(team.uri, here / "one")
    assert_store_equals_journal(team.uri, here / "two", "KILLED")


def status(
    team,
    *,
    host=None,
    password: str | None = PASSWORD,
    origin=None,
    path="/ajax-api/2.0/mlflow/experiments/search",
) -> int:
    """HTTP status of a request as the pages of MLflow make it."""
    headers = {"Content-Type": "application/json"}
    headers |= {"Host": host} if host else {}
    headers |= {"Origin": origin} if origin else {}
    headers |= (
        {"Authorization": f"Basic {b64encode(f'{NAME}:{password}'.encode()).decode()}"}
        if password
        else {}
    )
    try:
        with urllib.request.urlopen(
            urllib.request.Request(team.uri + path, b'{"max_results": 1}', headers), timeout=30
        ) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_with_the_password_by_its_own_names_and_from_its_own_pages(team):
    own = team.uri.removeprefix("http://")
    assert status(team) == 200
    assert status(team, password=None) == 401
    assert status(team, password="guessed") == 401
    assert [
        status(team, host=host)
        for host in (own, own.partition(":")[0], f"localhost:{team.port}", "127.0.0.1")
    ] == [200] * 4
    assert [status(team, host=host) for host in ("evil.example", f"evil.example:{team.port}")] == [
        403
    ] * 2
    assert status(team, origin=team.uri) == 200
    assert status(team, origin="http://evil.example") == 403
