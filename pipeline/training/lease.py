"""The right to write into a run folder, which only the newest start of the run has.

A node that Slurm has given up may still be running, and so may a job that was submitted twice. Both
come to a checkpoint or a metric at some time, and find that the run is no longer theirs.
"""

import re
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import write_atomically


class Lease:
    """The right of ``owner`` (``World.incarnation``) to write into a run's folder.

    For the main process only. ``path`` is the file that names the one who has it.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self._path, self._owner = path, owner

    def take(self) -> None:
        """Become the one who writes.

        Raises:
            UserError: a later restart of this very Slurm job already is.
        """
        holder = self._holder()
        if _later_restart(holder, self._owner):
            raise UserError(
                f"run {self._path.parent}: {holder} is training it, "
                f"so the older {self._owner} stops"
            )
        write_atomically(self._path, self._owner.encode())

    def check(self) -> None:
        """Raise UserError if another start has taken over."""
        if (holder := self._holder()) != self._owner:
            raise UserError(
                f"run {self._path.parent}: {holder or 'nobody'} has taken over its training from "
                f"{self._owner}, which stops"
            )

    def _holder(self) -> str:
        return self._path.read_text() if self._path.exists() else ""


def _later_restart(holder: str, other: str) -> bool:
    """Whether both are restarts of one Slurm job, ``holder`` the later."""
    parts = [re.fullmatch(r"slurm-(\d+)\.(\d+)", name) for name in (holder, other)]
    if parts[0] is None or parts[1] is None or parts[0][1] != parts[1][1]:
        return False
    return int(parts[0][2]) > int(parts[1][2])
