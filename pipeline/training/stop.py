"""Requests to stop: from Slurm before a time limit (USR1) or at a preemption (TERM), or a person.

The signal reaches each process at another point of its work, so it is only noted. At a point where
all processes meet anyway they agree, save together and exit with REQUEUE, for the job script to
start the run again.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from pipeline.distributed import World, sum_across_ranks
from pipeline.slurm import report_event

# Exit code: all is saved, start the run again.
REQUEUE = 85
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stop:
    """A process's note of whether it has been asked to stop.

    A context manager, which takes over SIGUSR1 and SIGTERM and gives them back. A launcher may have
    blocked both signals, because Python takes seconds to start and would die of them: what has
    arrived since then is delivered at entry. Later ones change nothing: a process that is saving
    goes on saving.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._handlers: dict[signal.Signals, Any] = {}
        self.asked = False
        self._nothing_to_save = False

    def __enter__(self) -> "Stop":
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            return
        self.asked = True
        if self._nothing_to_save:
            self.leave()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a process that is asked to stop in this block do so where it is.

        For work that a restart repeats, such as an evaluation.
        """
        if self.asked:
            self.leave()
        self._nothing_to_save = True
        try:
            yield
        finally:
            self._nothing_to_save = False

    def flag(self) -> torch.Tensor:
        """Scalar on the device, 1 if this process has been asked, else 0.

        Summed over all processes, it is positive if any has been.
        """
        return torch.tensor(float(self.asked), device=self._world.device)

    def agreed(self) -> bool:
        """Whether any process has been asked to stop.

        Every process must call it; all get the same answer.
        """
        return sum_across_ranks(self.flag()).item() > 0

    def leave(self) -> None:
        """Exit with REQUEUE."""
        report_event("stopped")
        raise SystemExit(REQUEUE)
