"""The command line: ``coda`` or ``python -m pipeline``."""

import argparse
import atexit
import gc
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Literal

import pipeline
from pipeline.caches import use_local_caches
from pipeline.cli.parser import make_parser
from pipeline.errors import UserError, tracebacks_wanted
from pipeline.files import AWAY, FAILING, FULL, PATH
from pipeline.log import log_to_stderr
from pipeline.slurm import Event, report_event

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 or, after Ctrl-C, 130.

    A user's mistake, a package that cannot be imported and a disk that is full or failing are one
    line on stderr and 2; with CODA_TRACEBACK=1 the traceback is above that line. Any other error is
    raised.
    """
    # Before it ends, the interpreter would search all that it has loaded for garbage: 3 s of a
    # processor, while Slurm waits.
    atexit.register(gc.freeze)
    with log_to_stderr():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = hasattr(options, "overrides")
    if any(word.startswith("-") or "=" not in word or not takes_overrides for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # argparse takes no positional arguments behind an option.
    if rest:
        options.overrides += rest
    try:
        if options.models:
            # Before the libraries that ask for them are imported.
            use_local_caches()
            _register_models()
        return options.run(options) or 0
    except UserError as error:
        return _failed("mistake", str(error))
    except ImportError as error:
        # Another attempt would not mend it.
        return _failed("mistake", _import_failure(error, options))
    except OSError as error:
        if (kind := _kind(error)) is None:
            raise
        remedy = "; make room there and start the same command again" if error.errno in FULL else ""
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _failed(kind, " ".join(text.split()) + remedy)
    except KeyboardInterrupt:
        print(
            "coda: interrupted; the same command continues where this one was stopped",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


def _failed(event: Event, text: str) -> int:
    report_event(event)
    if tracebacks_wanted():
        traceback.print_exc()
    print(f"coda: {text}", file=sys.stderr)
    return EXIT_USER_ERROR


def _kind(error: OSError) -> Literal["disk", "mistake"] | None:
    """What ``error`` is about, if that is understood: libraries for networks raise it, too."""
    if error.errno in FULL | FAILING or (error.errno in AWAY and error.filename):
        return "disk"
    of_path = error.errno in PATH and error.filename
    # ctypes says in words, without a number, which library it cannot load.
    of_library = type(error) is OSError and error.errno is None and re.search(r"\.so\b", str(error))
    return "mistake" if of_path or of_library else None


def _register_models() -> None:
    try:
        pipeline.register_models()
    except (OSError, RuntimeError) as error:
        # An error of the disk that they are on has a number. Others come from a torchvision of
        # another torch, or a library of CUDA that is missing.
        if getattr(error, "errno", None):
            raise
        raise ImportError(f"torch, torchvision or timm: {error}") from error


def _import_failure(error: ImportError, options: argparse.Namespace) -> str:
    """Say in one line what is missing or broken, with the remedy."""
    command = f"`coda {options.command}`"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = f"coda-pipeline[{options.extra}]" if options.extra else "coda-pipeline"
        remedy = f"pip install '{package}', or make setup in a checkout"
        return f"{command} needs {error.name}, which is not installed: {remedy}"
    reason = " ".join(str(error).split())
    name = f"{error.name}: " if error.name and error.name not in reason else ""
    return f"{command} cannot import {name}{reason}; `coda doctor` says what this machine lacks"
