"""Ranks from environments, and collectives of real processes."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from pipeline.distributed import average_buffers, gather_across_ranks, process_group, ranks, sum_across_ranks
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 0, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, (3, 1, 4)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}, (5, 1, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 0, 1)),  # a batch script's own shell is no step
    ],
)
def test_ranks_of_an_environment(environment, expected):
    assert ranks(environment) == expected


@pytest.mark.parametrize("environment", [{"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}])
def test_half_an_environment_is_refused_by_name(environment):
    with pytest.raises(UserError, match="environment variable (LOCAL_RANK|RANK)"):
        ranks(environment)


def _member(rank, port, results):
    import os

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with process_group(timeout_seconds=60) as world:
        norm = nn.BatchNorm2d(1)
        norm.running_mean.fill_(rank)
        average_buffers(norm)
        total = sum_across_ranks(torch.tensor([1.0 + rank]))
        results.put((rank, world.is_main, total.item(), gather_across_ranks(f"r{rank}"), norm.running_mean.item()))


def test_collectives_of_two_processes():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.start_processes(_member, args=(port, results), nprocs=2, start_method="spawn")
    seen = sorted(results.get() for _ in range(2))
    assert seen == [(0, True, 3.0, ["r0", "r1"], 0.5), (1, False, 3.0, ["r0", "r1"], 0.5)]


def test_one_process_alone_needs_no_environment():
    with process_group() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert gather_across_ranks(1) == [1]
