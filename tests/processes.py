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


# The fork server imports these once for all processes; not FFCV, which starts threads.
PRELOADED = ["timm", "deepspeed", "mlflow"]


def run_on(count: int, function: Callable[..., None], *arguments: object) -> None:
    """Call ``function(rank, count, port, *arguments)`` on ``count`` new processes.

    An error of any of them is raised here. All have the environment of the first call.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(
        function, args=(count, free_port(), *arguments), nprocs=count, start_method="forkserver"
    )


def stand_as(rank: int, size: int, port: int) -> None:
    """Set the variables by which torchrun tells a process its place."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def forget_process_groups() -> None:
    """Make DeepSpeed forget the process group of its first engine.

    Otherwise it keeps this group for good, and the next engine cannot have another.
    """
    if "deepspeed" in sys.modules:
        import deepspeed
        from torch.distributed import ProcessGroup

        for name, value in vars(deepspeed.utils.groups).items():
            if isinstance(value, ProcessGroup):
                setattr(deepspeed.utils.groups, name, None)
        deepspeed.comm.comm.cdb = None
