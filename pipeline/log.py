"""The commands' log: what all modules report while they work, on stderr.

A module logs by ``logging.getLogger(__name__)``. Who uses the modules without the command line sees
what Python's logging shows by default, or configures the logger ``pipeline``.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import tracebacks_wanted


class _BesideBars(logging.Handler):
    """Writes each message above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message of ``record``, warnings marked as such."""
        sign = "warning: " if record.levelno >= logging.WARNING else ""
        text = f"{sign}{self.format(record)}"
        # Bare environments, which `coda doctor` is for, lack it.
        if bars := sys.modules.get("tqdm"):
            bars.tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show what the modules report, for the duration of the block.

    Of several processes the main one reports; with CODA_TRACEBACK=1 the warnings of all are shown.
    """
    logger, handler = logging.getLogger("pipeline"), _BesideBars()
    level, propagate = logger.level, logger.propagate
    others = logging.WARNING if tracebacks_wanted() else logging.ERROR
    logger.setLevel(logging.INFO if is_main_process() else others)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        # Not by assignment: the modules' loggers remember what they have looked up.
        logger.setLevel(level)


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher has started, or the only one."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
