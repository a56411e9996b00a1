"""Processes, ranks, and the few collectives that the pipeline needs.

Only this module decides by RANK and the variables of Slurm which process this is in its group.
"""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.slurm import first_node


@dataclass(frozen=True)
class World:
    """This process among all processes of the run, and its device."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    incarnation: str = "alone"
    """Name of this start of the run, the same on all processes; see ``incarnation``."""
    timeout_seconds: float = 1800
    """Time for which a process waits for the others before it gives up."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to MLflow."""
        return self.rank == 0


def ranks(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, local rank and world size of this process.

    They come from torchrun's variables, else from those of a Slurm step; else the process is alone.

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
            raise UserError(
                f"environment variable {name} is {environment.get(name)!r}; torchrun or srun sets "
                "it to a number"
            )
        values.append(int(environment[name]))
    return values[0], values[1], values[2]


def rendezvous(environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port at which the processes meet.

    These are MASTER_ADDR and MASTER_PORT, else they follow from Slurm's variables: the address is
    the first node's name; the port lies below the kernel's ephemeral ports and differs between
    jobs, array tasks and restarts, so that neither a neighbour nor an earlier start holds it.

    Raises:
        UserError: the environment has neither.
    """
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not address and nodes:
        address = first_node(nodes)
    if not port and (job := environment.get("SLURM_JOB_ID")):
        restart = int(environment.get("SLURM_RESTART_COUNT") or 0)
        port = str(10000 + (int(job) * 31 + restart) % 20000)
    if not address or not port:
        name = "MASTER_PORT" if address else "MASTER_ADDR"
        raise UserError(
            f"environment variable {name} is not set; torchrun sets it, and under srun it follows "
            "from Slurm's own"
        )
    return address, int(port)


def device_index(local_rank: int, visible: int) -> int:
    """Index of this process's GPU among the ``visible`` ones.

    Slurm shows a process either its own GPU or all GPUs of the node.

    Raises:
        UserError: the node has more processes than GPUs.
    """
    if visible > 1 and local_rank >= visible:
        raise UserError(
            f"process {local_rank} of this node finds only {visible} GPUs: ask for "
            "--gpus-per-node=--ntasks-per-node"
        )
    return local_rank if visible > 1 else 0


def incarnation(environment: Mapping[str, str]) -> str:
    """Name of this start of the run: ``slurm-<job>.<restart>``, else the host and process."""
    if "SLURM_STEP_ID" in environment and "SLURM_JOB_ID" in environment:
        return f"slurm-{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT') or 0}"
    return f"{socket.gethostname()}-{os.getpid()}"


@contextmanager
def process_group(timeout_seconds: float | None = None) -> Iterator[World]:
    """Join the process group for the duration of the block, alone or under torchrun or srun.

    The backend is NCCL on GPUs, else gloo.

    Args:
        timeout_seconds: time for which a process waits for the others before it gives up with an
            error; by default CODA_TIMEOUT_SECONDS, or 1800.

    Yields:
        this process among all.

    Raises:
        UserError: the environment does not describe a process group.
    """
    rank, local_rank, size = ranks(os.environ)
    timeout_seconds = timeout_seconds or _timeout(os.environ)
    if torch.cuda.is_available():
        device = torch.device("cuda", device_index(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(_threads(os.environ, size))
    # Under torchrun, even a single process must use the store of its agent.
    alone = size == 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    variables: dict[str, object] = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": size}
    meeting: dict[str, Any] = {}
    if alone:
        _check_loopback()
        store = dist.HashStore()  # type: ignore[attr-defined]  # Public, but missing in __all__.
        meeting = {"store": store, "rank": 0, "world_size": 1}
    else:
        variables["MASTER_ADDR"], variables["MASTER_PORT"] = rendezvous(os.environ)
    # PyTorch and DeepSpeed read these.
    os.environ.update({name: str(value) for name, value in variables.items()})
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), **meeting)
    try:
        name = gather_across_ranks(incarnation(os.environ))[0]
        yield World(rank, local_rank, size, device, name, timeout_seconds)
    finally:
        dist.destroy_process_group()


def _timeout(environment: Mapping[str, str]) -> float:
    text = environment.get("CODA_TIMEOUT_SECONDS") or str(World.timeout_seconds)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(
            f"environment variable CODA_TIMEOUT_SECONDS is {text!r}; it must be a positive number "
            "of seconds"
        )
    return seconds


def _threads(environment: Mapping[str, str], size: int) -> int:
    """Number of threads of this process.

    This is Slurm's share of processors; else the processes of a machine share those they may use.
    """
    available = len(os.sched_getaffinity(0))
    if share := environment.get("SLURM_CPUS_PER_TASK"):
        return max(1, min(available, int(share)))
    return max(1, available // int(environment.get("LOCAL_WORLD_SIZE") or size))


def _check_loopback() -> None:
    """Check that this machine reaches itself: gloo connects even a process that is alone.

    Raises:
        UserError: it does not.
    """
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            socket.create_connection(listener.getsockname(), timeout=10).close()
        except OSError as error:
            remedy = "the loopback interface must be up: `ip link set lo up`, as root"
            raise UserError(
                f"address 127.0.0.1 of this machine: {error.strerror or error}; {remedy}"
            ) from error


def sum_across_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum ``values`` over all processes, in place and on every process.

    Without a process group, ``values`` stay as they are.
    """
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_across_ranks(value: object) -> list[Any]:
    """Gather the picklable ``value`` of every process, in order of rank, on every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_collectively(step: Callable[[], object], *, main_only: bool = False) -> None:
    """Run ``step`` on all processes, or on the main one; if it fails on one, fail on all.

    Every process must call this. No process is left waiting for another that has failed.

    Args:
        step: called without arguments; its result is dropped.
        main_only: whether only the main process runs it.

    Raises:
        Exception: the error of ``step`` on this process; else the error on the first process that
            failed, replaced by a RuntimeError if it is neither a UserError nor an OSError.
    """
    failure: Exception | None = None
    try:
        if not main_only or _rank() == 0:
            step()
    except Exception as error:
        # The waiting processes learn of it first; then it is raised.
        failure = error
    known = failure is None or isinstance(failure, UserError | OSError)
    told = failure if known else RuntimeError(f"process {_rank()} failed: {failure!r}")
    failures = gather_across_ranks(told)
    if failure is not None:
        raise failure
    for found in failures:
        if found is not None:
            raise found


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def lost_peer(error: Exception) -> bool:
    """Whether ``error`` says that another process of the group has gone or does not answer."""
    # The errors of NCCL and of the store.
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and "gloo/transport" in str(error)


def barrier() -> None:
    """Wait until every process has reached this point."""
    if dist.is_initialized():
        dist.barrier()


def average_buffers(model: torch.nn.Module) -> None:
    """Replace floating point buffers (batch norm statistics) by their mean over all processes."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()
