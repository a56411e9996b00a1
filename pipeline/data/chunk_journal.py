"""The journal of a .beton file that is being written, from which an interrupted writer continues.

It survives any end of the writer, kill -9 and power failure included. One line per chunk of images,
in their order, is appended once the chunk's bytes are on the disk: a hash of the line, and JSON.
The first line identifies what is written; the journal of something else is ignored.
"""

import base64
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from pipeline.data.beton import STORED_IMAGE
from pipeline.files import sync


@dataclass(frozen=True)
class Chunk:
    """Consecutive images of the source."""

    begin: int
    """Address in the .beton file; padding before the first image is included."""
    end: int
    """Address at which the last image ends."""
    images: np.ndarray
    """(N,) STORED_IMAGE."""
    broken: tuple[tuple[int, str], ...]
    """Index in the source and error of each image that is left out."""
    xxh64: str
    """XXH3-64 of the bytes from begin to end."""


class ChunkJournal:
    """The finished chunks of a .beton file.

    Args:
        data: the .beton file.
        identity: a hash of the source and the settings.

    Attributes:
        chunks: chunks that an earlier process has finished; empty if the journal is foreign.
        foreign: whether an earlier process wrote something other than ``identity``.
    """

    def __init__(self, data: Path, identity: str):
        self.path = data.with_name(f"{data.name}.journal")
        self.data = data
        self.foreign = False
        self.chunks: list[Chunk] = []
        head = json.dumps({"identity": identity}).encode() + b"\n"
        lines: list[bytes] = []
        if self.path.is_file() and data.is_file():
            lines = self.path.read_bytes().splitlines(keepends=True)
        if lines:
            self.foreign = lines[0] != head
            if not self.foreign:
                self.chunks = list(_chunks(lines[1:], data.stat().st_size))
        if self.chunks:
            os.truncate(self.path, sum(map(len, lines[: 1 + len(self.chunks)])))
        else:
            self.path.write_bytes(head)

    def commit(self, chunks: Sequence[Chunk]) -> None:
        """Sync the .beton file to the disk, then append ``chunks`` to the journal."""
        sync(self.data)
        with open(self.path, "ab") as file:
            file.writelines(_line(chunk) for chunk in chunks)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the journal: the file is whole, or holds nothing worth keeping."""
        self.path.unlink(missing_ok=True)


def _line(chunk: Chunk) -> bytes:
    text = json.dumps(
        {**vars(chunk), "images": base64.b64encode(chunk.images.tobytes()).decode()}
    ).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def _chunks(lines: Sequence[bytes], size: int) -> Iterator[Chunk]:
    """Yield the chunks of ``lines`` up to the first one that cannot be trusted.

    Such a line is damaged, for example cut off, or ends beyond the ``size`` bytes of the file.
    """
    for line in lines:
        digest, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or xxhash.xxh3_64_hexdigest(text[:-1]).encode() != digest:
            return
        tree = json.loads(text)
        if tree["end"] > size:
            return
        tree["images"] = np.frombuffer(base64.b64decode(tree["images"]), STORED_IMAGE)
        yield Chunk(
            **{**tree, "broken": tuple((index, reason) for index, reason in tree["broken"])}
        )
