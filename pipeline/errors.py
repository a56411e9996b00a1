"""The exception for a user's mistake, and whether tracebacks are shown."""

import os


class UserError(Exception):
    """Bad input from outside: recipe, image, data, checkpoint or environment.

    Its message says what is wrong, where, and what would be valid. The command line prints it as
    one line and exits with code 2.
    """


def tracebacks_wanted() -> bool:
    """Whether the user asks for the traceback of each error, also of one that is told in a line."""
    return os.environ.get("CODA_TRACEBACK") == "1"
