"""The journals of a run: append-only files in its folder, one for what the training says and one
for each node that is watched.
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

# its name in the run folder
JOURNAL = "journal.jsonl"
NODE_JOURNALS = "system-*.jsonl"
# tag by which a run is found that was created just before this process died
RUN_KEY = "coda.run_key"
# the names MLflow takes
_KEY = re.compile(r"(?=.{1,250}$)\w[\w.\- :]*(/\w[\w.\- :]*)*")
KINDS = ("metric", "param", "tag", "artifact", "image", "dataset", "model", "status")


class Journal:
    """An append-only file and what it holds. A last line without its end, left by a kill, is cut
    off.

    It is locked for as long as it is open, where the file system has locks: ``sync`` sees by that
    whether its run is alive.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, dict[Any, Any]] = {kind: {} for kind in KINDS}
        self.size = 0
        self._file = open(path, "a+b")
        # a process that was killed may have left a child that holds it: no reason to stop a
        # training
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
                    f"{path} line {number}: is no journal entry; repair it or move the file away"
                ) from error
            self.size += len(line)
        self._file.truncate(self.size)

    def append(self, kind: str, values: Mapping[str, Any], **rest: Any) -> None:
        """One line per entry of ``values``, all in one write."""
        for key in values:
            if kind != "artifact" and not _KEY.fullmatch(key):
                raise ValueError(
                    f"{key!r}: MLflow takes only letters, digits, blanks and _ - . / : in names"
                )
        now = time.time_ns() // 1_000_000
        records = [
            {"kind": kind, "key": key, "value": value, "timestamp": now} | rest
            for key, value in values.items()
        ]
        self.size += self._file.write(
            b"".join(json.dumps(record).encode() + b"\n" for record in records)
        )
        self._file.flush()
        for record in records:
            self._remember(record)

    def sync_to_disk(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _remember(self, record: dict[str, Any]) -> None:
        key = (
            (record["key"], record["step"])
            if record["kind"] in ("metric", "image")
            else record["key"]
        )
        self.known[record["kind"]][key] = record["value"]
        self.last_time = record["timestamp"]


def is_open(path: Path) -> bool:
    """Whether a process of this machine, or of any that shares the file's locks, has the journal at
    ``path`` open.
    """
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
