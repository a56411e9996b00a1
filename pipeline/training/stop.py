"""Being asked to stop: by Slurm before a time limit (USR1), at a preemption or scancel (TERM), or
by a person.

The signal reaches each process at another point of its work, so it is only noted; at a point where
all processes meet anyway they agree, save together and exit with REQUEUE, for the job script to
start the training again.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from pipeline.distributed import World, sum_across_ranks
from pipeline.slurm import report_event

# exit code: all is saved, start me again
REQUEUE = 85
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stop:
    """Whether this process has been asked to stop; a context manager that takes over SIGUSR1 and
    SIGTERM and gives them back.

    A launcher may have blocked both signals, because Python takes seconds to come this far and
    would die of them: what has arrived since then is delivered at entry. Later ones change nothing:
    a process that is saving goes on saving.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.asked = False
        self._nothing_to_save = False

    def __enter__(self) -> "Stop":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if self._nothing_to_save and not again:
            self.leave()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that a restart repeats, such as an evaluation: in this block a process that is asked
        to stop does so where it is.
        """
        if self.asked:
            self.leave()
        self._nothing_to_save = True
        try:
            yield
        finally:
            self._nothing_to_save = False

    def flag(self) -> torch.Tensor:
        """Scalar on the device, 1 if this process has been asked: summed over all processes, it is
        positive if any was.
        """
        return torch.tensor(float(self.asked), device=self._world.device)

    def agreed(self) -> bool:
        """Whether any process has been asked to stop. Every process must call it; all get the same
        answer.
        """
        return sum_across_ranks(self.flag()).item() > 0

    def leave(self) -> None:
        """Exit with REQUEUE."""
        report_event("stopped")
        raise SystemExit(REQUEUE)
