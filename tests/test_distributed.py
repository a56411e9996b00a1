"""Ranks from environments, and collectives of real processes."""

import subprocess
import sys
from multiprocessing import get_context

import pytest
import torch
from processes import free_port, run_on, stand_as
from torch import nn

from pipeline.distributed import (
    average_buffers,
    device_index,
    gather_across_ranks,
    incarnation,
    process_group,
    ranks,
    rendezvous,
    run_collectively,
    sum_across_ranks,
)
from pipeline.errors import UserError
from pipeline.slurm import first_node, job_tags, report_event


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 0, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, (3, 1, 4)),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"},
            (5, 1, 8),
        ),
        # The shell of a batch script is not a step.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 0, 1)),
    ],
)
def test_ranks_of_an_environment(environment, expected):
    assert ranks(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}],
)
def test_half_an_environment_is_refused_by_name(environment):
    with pytest.raises(UserError, match=r"environment variable (LOCAL_RANK|RANK)"):
        ranks(environment)


SLURM = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "123456", "SLURM_STEP_NODELIST": "gpu[003-004]"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MASTER_ADDR": "host", "MASTER_PORT": "29500", **SLURM}, ("host", 29500)),
        (SLURM, ("gpu003", 10000 + 123456 * 31 % 20000)),
        ({**SLURM, "SLURM_RESTART_COUNT": "2"}, ("gpu003", 10002 + 123456 * 31 % 20000)),
        ({"MASTER_ADDR": "10.0.0.7", **SLURM}, ("10.0.0.7", 10000 + 123456 * 31 % 20000)),
    ],
)
def test_where_the_processes_meet(environment, expected):
    assert rendezvous(environment) == expected


@pytest.mark.parametrize(
    ("environment", "name"), [({}, "MASTER_ADDR"), ({"MASTER_ADDR": "host"}, "MASTER_PORT")]
)
def test_nowhere_to_meet_is_said_by_name(environment, name):
    with pytest.raises(UserError, match=f"environment variable {name} is not set"):
        rendezvous(environment)


def test_processes_of_torchrun_meet(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text(
        "import sys\n"
        "from pipeline.distributed import process_group\n"
        "with process_group() as world:\n"
        "    # One write for each line, so that two lines do not mix.\n"
        "    sys.stdout.write(f'{world.rank} {world.size}\\n')\n"
    )
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.splitlines()) == ["0 2", "1 2"], done.stderr


def test_one_process_may_be_all_of_a_group(monkeypatch):
    """As after ``torchrun --nproc-per-node 1``."""
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }.items():
        monkeypatch.setenv(name, str(value))
    with process_group() as world:
        assert (world.rank, world.size) == (0, 1)
        assert gather_across_ranks("r0") == ["r0"]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-007,12],login", "gpu003"),
        ("a[5,7-9]-ib", "a5-ib"),
        ("rack-b-[10-11]", "rack-b-10"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 4, 0), (3, 4, 3), (3, 1, 0)])
def test_the_device_of_a_process(local_rank, visible, index):
    assert device_index(local_rank, visible) == index


def test_more_processes_than_devices_are_refused():
    with pytest.raises(UserError, match="finds only 2 GPUs"):
        device_index(2, 2)


def test_each_start_has_another_name():
    assert incarnation(SLURM) == "slurm-123456.0"
    assert incarnation({**SLURM, "SLURM_RESTART_COUNT": "3"}) == "slurm-123456.3"
    assert not incarnation({}).startswith("slurm")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf"])
def test_a_timeout_that_is_none(monkeypatch, text):
    monkeypatch.setenv("CODA_TIMEOUT_SECONDS", text)
    with pytest.raises(UserError, match=f"CODA_TIMEOUT_SECONDS is '{text}'"), process_group():
        pass


def test_reports_go_to_the_job_script(monkeypatch, tmp_path):
    monkeypatch.delenv("CODA_REPORTS", raising=False)
    # Nobody asked for this one.
    report_event("saved", 3)
    monkeypatch.setenv("CODA_REPORTS", str(tmp_path))
    monkeypatch.setenv("SLURM_PROCID", "1")
    report_event("saved", 4)
    report_event("stopped")
    assert (tmp_path / "events-1").read_text() == "saved 4\nstopped 0\n"


def _member(rank, size, port, results):
    stand_as(rank, size, port)
    with process_group(timeout_seconds=60) as world:
        norm = nn.BatchNorm2d(1)
        norm.running_mean.fill_(rank)
        average_buffers(norm)
        total = sum_across_ranks(torch.tensor([1.0 + rank]))
        with pytest.raises(OSError, match="full") as failure:
            run_collectively(lambda: _fail_on(1, rank))
        gathered = gather_across_ranks(f"r{rank}")
        results.put(
            (
                rank,
                world.is_main,
                total.item(),
                gathered,
                norm.running_mean.item(),
                str(failure.value),
            )
        )


def _fail_on(failing, rank):
    if rank == failing:
        raise OSError(f"disk of {rank} is full")


def _fail_in_its_own_way(rank, size, port, results):
    stand_as(rank, size, port)
    with process_group(timeout_seconds=60):
        try:
            run_collectively(lambda: {}["nothing"], main_only=True)
        except Exception as error:
            results.put((rank, repr(error)))


def test_an_error_that_nobody_foresaw_is_itself_where_it_happened():
    results = get_context("forkserver").SimpleQueue()
    run_on(2, _fail_in_its_own_way, results)
    seen = dict(results.get() for _ in range(2))
    assert seen[0] == "KeyError('nothing')"
    assert "process 0 failed" in seen[1]
    assert seen[1].startswith("RuntimeError")


def test_collectives_of_two_processes():
    results = get_context("forkserver").SimpleQueue()
    run_on(2, _member, results)
    seen = sorted(results.get() for _ in range(2))
    # It fails on both, so that neither waits for the other.
    failure = "disk of 1 is full"
    assert seen == [
        (0, True, 3.0, ["r0", "r1"], 0.5, failure),
        (1, False, 3.0, ["r0", "r1"], 0.5, failure),
    ]


def test_one_process_alone_needs_no_environment():
    with process_group() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert gather_across_ranks(1) == [1]


def test_tags_of_a_job():
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": "3"}
    assert job_tags(job) == {"slurm/job": "17", "slurm/nodes": "n[1-2]", "slurm/restarts": "3"}
    assert job_tags({"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n1"})["slurm/restarts"] == "0"
    assert job_tags({}) == {}
