"""Traces of a failed run: the first error of any process, and the stacks when nothing moved."""

import faulthandler
import logging
import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.distributed import World, lost_peer
from pipeline.errors import UserError, tracebacks_wanted
from pipeline.files import FULL
from pipeline.run_folder import RunFolder
from pipeline.training.stop import Stop

log = logging.getLogger(__name__)


@contextmanager
def first_error(folder: RunFolder, world: World, stop: Stop) -> Iterator[None]:
    """Keep the first exception of any process in first_error.txt, until the run has finished.

    One failure brings many: the others lose their connection. A process that was asked to stop and
    then loses its connection has peers that were faster to leave: it leaves as they did. Any other
    exception is kept, asked to stop or not. A user's mistake that is found before there is a run
    leaves no file behind.
    """
    path = folder.first_error
    try:
        yield
    except Exception as error:
        if stop.asked and lost_peer(error):
            log.warning(
                "asked to stop; the other processes have left: %s",
                error,
                exc_info=tracebacks_wanted(),
            )
            stop.leave()
        if isinstance(error, UserError) and not folder.path.exists():
            raise
        if isinstance(error, OSError) and error.errno in FULL and not error.filename:
            # A write into an open file says only that the disk is full, not which.
            error.filename = str(folder)
        try:
            _write_first(path, world, error)
        except OSError as unwritten:
            # The disk may be full, which may be the very error.
            error.add_note(f"{path} could not be written: {unwritten}")
        raise
    if world.is_main:
        path.unlink(missing_ok=True)


def _write_first(path: Path, world: World, error: Exception) -> None:
    title = f"process {world.rank} of {world.size}, {world.incarnation}, {os.uname().nodename}"
    mine = path.with_name(f".{path.name}.{world.rank}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        mine.write_text(f"{title}\n{''.join(traceback.format_exception(error))}")
        try:
            # Fails where another process was first.
            os.link(mine, path)
        except FileExistsError:
            if f", {world.incarnation}, " not in path.read_text().partition("\n")[0]:
                os.replace(mine, path)
    finally:
        mine.unlink(missing_ok=True)


class Watchdog:
    """Writes the stacks of all threads when nothing moves, or when SIGUSR2 asks for them.

    They go to stacks/<incarnation>-rank-<r>.txt in the run folder. It works in C, without the
    interpreter, so it sees a process that hangs in a library. It fires a little before the
    processes that wait for a hung one give up, while all are still alive. A context manager.
    """

    def __init__(self, folder: RunFolder, world: World) -> None:
        self._seconds = 0.9 * world.timeout_seconds
        path = folder.stacks / f"{world.incarnation}-rank-{world.rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, path.open("w")

    def __enter__(self) -> "Watchdog":
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)
        self.beat()
        return self

    def beat(self) -> None:
        """Note that something has moved: the time starts anew."""
        faulthandler.dump_traceback_later(self._seconds, file=self._file)

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink()
