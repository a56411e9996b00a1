"""Several processes in one test, and process groups that come and go in one process."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable

import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# once for all; not FFCV, which starts threads
IMPORTED = ["timm", "deepspeed", "mlflow"]


def run_on(count: int, function: Callable[..., None], *arguments: object) -> None:
    """``function(rank, count, port, *arguments)`` on ``count`` new processes.

    An error of any is raised here. They have the environment of the first call.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    mp.start_processes(
        function, args=(count, free_port(), *arguments), nprocs=count, start_method="forkserver"
    )


def stand_as(rank: int, size: int, port: int) -> None:
    """What torchrun tells a process."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def forget_process_groups() -> None:
    """DeepSpeed remembers the process group of its first engine for good; after this, the next one
    may have another.
    """
    if "deepspeed" in sys.modules:
        import deepspeed
        from torch.distributed import ProcessGroup

        for name, value in vars(deepspeed.utils.groups).items():
            if isinstance(value, ProcessGroup):
                setattr(deepspeed.utils.groups, name, None)
        deepspeed.comm.comm.cdb = None
