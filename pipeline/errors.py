"""The one exception for a user's mistake: the command line prints it as a single line and exits
with code 2. And what a job is told.
"""

import os
from contextlib import suppress
from pathlib import Path


class UserError(Exception):
    """Bad input from outside (recipe, file, checkpoint, environment): says what is wrong, where,
    and what would be valid.
    """


def tracebacks_wanted() -> bool:
    """Whether the user asks for the traceback of each error, also of one that is told in a line."""
    return os.environ.get("CODA_TRACEBACK") == "1"


def report(event: str, value: int = 0) -> None:
    """Tell the job script, which cannot rely on srun's exit code: append to this process's file in
    CODA_REPORTS, if that is set.
    """
    if folder := os.environ.get("CODA_REPORTS"):
        # A disk that is full is no reason to end a training here, nor to hide the error that is
        # being reported.
        with (
            suppress(OSError),
            (Path(folder) / f"events-{os.environ.get('SLURM_PROCID', '0')}").open("a") as file,
        ):
            file.write(f"{event} {value}\n")
