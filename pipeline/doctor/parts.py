"""The checks that need packages: their names, their order, and on what each builds.

Standard library only.
"""

from enum import Enum
from typing import NamedTuple


class State(Enum):
    """The result of a check."""

    OK = "ok"
    FAILED = "FAILED"
    UNKNOWN = "unknown"
    """No answer in time, or a check on which this one builds has failed."""


class Check(NamedTuple):
    """Outcome of one check."""

    name: str
    """As in the lists below, or of a probe of the machine."""
    state: State
    """The result."""
    detail: str
    """The finding, or the reason of the failure."""
    remedy: str
    """The act that mends it; empty where another check's remedy comes first."""


# One process imports them once, for all others.
BASE = ("torch", "torchvision", "timm")
# The lanes run beside each other. Within a lane one check runs after another, as not everywhere may
# two processes share a GPU.
LANES = (("process group", "gpu", "nccl", "deepspeed", "kernels"), ("ffcv",), ("mlflow",))
# Check -> the Python package that it needs.
PACKAGE = {name: name for name in (*BASE, "deepspeed", "ffcv", "mlflow")}
# Check -> those on which it builds.
AFTER = {
    "torch": (),
    "torchvision": ("torch",),
    "timm": ("torch", "torchvision"),
    **{name: BASE for lane in LANES for name in lane},
    "nccl": (*BASE, "gpu"),
    "kernels": (*BASE, "gpu"),
    "tracking": (*BASE, "mlflow"),
}
