"""The checks that need packages: their names, their order, and on what each builds.

Standard library only.
"""

from enum import Enum
from typing import NamedTuple


class State(Enum):
    """What a check has found."""

    OK = "ok"
    FAILED = "FAILED"
    # no answer in time, or something that it builds upon has failed
    UNKNOWN = "unknown"


class Check(NamedTuple):
    """Outcome of one check."""

    name: str
    state: State
    detail: str
    """What was found, or why it failed."""
    remedy: str
    """Empty where another check's comes first."""


# one process imports them once, for all others
BASE = ("torch", "torchvision", "timm")
# Run beside each other; within one, one after another, as not everywhere may two processes share a
# GPU.
LANES = (("process group", "gpu", "nccl", "deepspeed", "kernels"), ("ffcv",), ("mlflow",))
PACKAGE = {name: name for name in (*BASE, "deepspeed", "ffcv", "mlflow")}
AFTER = {
    "torch": (),
    "torchvision": ("torch",),
    "timm": ("torch", "torchvision"),
    **{name: BASE for lane in LANES for name in lane},
    "nccl": (*BASE, "gpu"),
    "kernels": (*BASE, "gpu"),
    "tracking": (*BASE, "mlflow"),
}
