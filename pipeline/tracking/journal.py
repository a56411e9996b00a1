"""The journals of a run: append-only files in its folder.

One holds what the run reports; each node that is watched has a further one for its load.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

# Name of the run's own journal in the run's folder, and pattern of those of its nodes.
# Tag by which a run is found that was created just before this process died.
RUN_KEY_TAG = "coda.run_key"
KINDS = ("metric", "param", "tag", "artifact", "image", "dataset", "model", "status")
# Kinds of which one key has an entry per step.
_STEPPED_KINDS = ("metric", "image")
# The names that MLflow takes.
_MLFLOW_NAME = re.compile(r"(?=.{1,250}$)\w[\w.\- :]*(/\w[\w.\- :]*)*")

Record = dict[str, Any]
"""An entry: ``kind``, ``key``, ``value`` (as JSON has it), ``timestamp`` (ms), maybe ``step``."""


class RunJournal:
    """An append-only file of records, and what they say.

    A last line without its end, left by a kill, is cut off. The file is locked for as long as it is
    open, where the file system has locks: ``sync`` sees by that whether its run is alive.

    Attributes:
        known: kind -> key, or (key, step) for metrics and images, -> last value.
        last_time: timestamp of the last record, in milliseconds since 1970.
        size: bytes of the file.

    Raises:
        UserError: a line that is not a record.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, dict[Any, Any]] = {kind: {} for kind in KINDS}
        self.last_time = 0
        self.size = 0
        # It stays open for as long as this object is in use.
        self._file = open(path, "a+b")  # noqa: SIM115
        # A process that was killed may have left a child that holds the lock: no reason to stop a
        # training run.
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                self._remember(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path} line {number}: is not a journal entry; repair it or move the file away"
                ) from error
            self.size += len(line)
        self._file.truncate(self.size)

    def append(self, kind: str, values: Mapping[str, Any], **rest: Any) -> None:
        """Write one record per entry of ``values``, all at once.

        Args:
            kind: one of KINDS.
            values: key -> value, as JSON takes it.
            **rest: further fields of each record, such as ``step``.

        Raises:
            ValueError: a key that MLflow does not take as a name.
        """
        for key in values:
            if kind != "artifact" and not _MLFLOW_NAME.fullmatch(key):
                raise ValueError(
                    f"{key!r}: MLflow takes only letters, digits, blanks and _ - . / : in names"
                )
        now = time.time_ns() // 1_000_000
        records: list[Record] = [
            {"kind": kind, "key": key, "value": value, "timestamp": now} | rest
            for key, value in values.items()
        ]
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        self.size += self._file.write(lines)
        self._file.flush()
        for record in records:
            self._remember(record)

    def sync_to_disk(self) -> None:
        """Return once all records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, which also unlocks it."""
        self._file.close()

    def _remember(self, record: Record) -> None:
        stepped = record["kind"] in _STEPPED_KINDS
        key = (record["key"], record["step"]) if stepped else record["key"]
        self.known[record["kind"]][key] = record["value"]
        self.last_time = record["timestamp"]


def is_open(path: Path) -> bool:
    """Whether a process has the journal at ``path`` open.

    It is seen if it runs on this machine, or on any that shares the file's locks.
    """
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
