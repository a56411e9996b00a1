"""The processes in which packages are tried, seen from the one that reports.

Standard library only.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.doctor.parts import State


class Worker:
    """A process that does checks; a context manager that ends it.

    Args:
        names: of the checks, as in ``parts``.
        folder: where files of the checks may be written.
        tracking: name of a setting or variable -> MLflow's address in it, which is checked, too.
        end: of all checks, on the monotonic clock.
        seconds: that all checks may take.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        tracking: Mapping[str, str],
        end: float,
        seconds: float,
    ):
        self._end, self._seconds = end, seconds
        self._answers: dict[str, tuple[State, str]] = {}
        self._rest = b""
        self._pipe, theirs = os.pipe()
        task = {
            "path": sys.path,
            "names": names,
            "folder": str(folder),
            "tracking": tracking,
            "seconds": seconds,
            "pipe": theirs,
        }
        script = Path(__file__).with_name("worker.py")
        # The task comes by a pipe, too, as everybody sees arguments, and an address may hold a
        # password.
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs],
            # So that all its children can be ended with it.
            start_new_session=True,
        )
        os.close(theirs)
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(json.dumps(task).encode())

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._pipe)

    def answer(self, name: str) -> tuple[State, str]:
        """Wait for the check ``name``, and return what it found."""
        while name not in self._answers:
            left = max(0.0, self._end - time.monotonic())
            ready, _, _ = select.select([self._pipe], [], [], left)
            if not ready:
                return State.UNKNOWN, f"no answer within the {self._seconds:g} s of all checks"
            content = os.read(self._pipe, 1 << 16)
            if not content:
                return State.FAILED, died(self._process.wait())
            *lines, self._rest = (self._rest + content).split(b"\n")
            for line in lines:
                of, state, detail = json.loads(line)
                self._answers[of] = State(state), detail
        return self._answers[name]


def died(code: int) -> str:
    """The end of a process in words, by its exit code, which is negative for a signal."""
    if code >= 0:
        return f"its process ended with code {code} and without an answer"
    why = ", which the system sends where memory is short" if code == -signal.SIGKILL else ""
    return f"its process died of {signal.Signals(-code).name}{why}"
