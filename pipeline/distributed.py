"""Processes and ranks: the only reader of RANK and SLURM_* variables, and the few collectives the pipeline needs."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all processes of the run, and its device."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to MLflow."""
        return self.rank == 0


def ranks(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, local rank, world size) from torchrun's variables, else Slurm's step variables, else a single process.

    Raises:
        UserError: a variable of the set is missing or not a number.
    """
    torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    slurm = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = torchrun
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        names = slurm
    else:
        return 0, 0, 1
    values = []
    for name in names:
        if not environment.get(name, "").isdigit():
            raise UserError(f"environment variable {name} is {environment.get(name)!r}; torchrun or srun sets it to a number")
        values.append(int(environment[name]))
    return values[0], values[1], values[2]


@contextmanager
def process_group(timeout_seconds: float = 1800) -> Iterator[World]:
    """Join the process group (NCCL on GPUs, else gloo) for the duration of the block, alone or under torchrun or srun.

    Raises:
        UserError: the environment does not describe a process group.
    """
    rank, local_rank, size = ranks(os.environ)
    if torch.cuda.is_available():
        device = torch.device("cuda", 0 if torch.cuda.device_count() == 1 else local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(_threads(os.environ, size))
    if size == 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"environment variable {name} is not set; torchrun and slurm/imagenet_coda.sh set it")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(size))  # what deepspeed reads
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds))
    try:
        yield World(rank, local_rank, size, device)
    finally:
        dist.destroy_process_group()


def _threads(environment: Mapping[str, str], size: int) -> int:
    """Processors this process may use, shared fairly with the other processes of its machine."""
    neighbours = environment.get("LOCAL_WORLD_SIZE") or environment.get("SLURM_NTASKS_PER_NODE") or str(size)
    return max(1, len(os.sched_getaffinity(0)) // int(neighbours))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def sum_across_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of ``values`` over all processes, in place and on every process; without a process group, ``values`` itself."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_across_ranks(value: object) -> list:
    """The picklable ``value`` of every process, in order of rank, on every process."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every process has come this far."""
    if dist.is_initialized():
        dist.barrier()


def average_buffers(model: torch.nn.Module) -> None:
    """Make floating point buffers (batch norm statistics) equal on all processes: their mean."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()
