"""What a writer has finished, so that the same command continues after any end, kill -9 and power
failure included.

One line per chunk of images, in their order, is appended after the chunk's bytes are on the disk: a
hash of the line, and JSON. The first line names what is written: a journal of something else is
worth nothing.
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
    """Address in the .beton file, padding before the first image included."""
    end: int
    images: np.ndarray  # (N,) STORED_IMAGE
    broken: tuple[tuple[int, str], ...]
    """Number in the source and error of those left out."""
    xxh64: str
    """Of the bytes from begin to end."""


class Journal:
    """The finished chunks of the .beton file ``data``.

    Attributes:
        chunks: those that an earlier process has finished; none if it wrote something other than
            ``identity``.
        foreign: whether it did.
    """

    def __init__(self, data: Path, identity: str):
        self.path, self.data = data.with_name(f"{data.name}.journal"), data
        head = json.dumps({"identity": identity}).encode() + b"\n"
        lines = (
            self.path.read_bytes().splitlines(keepends=True)
            if self.path.is_file() and data.is_file()
            else []
        )
        self.foreign = bool(lines) and lines[0] != head
        self.chunks = (
            list(_chunks(lines[1:], data.stat().st_size)) if lines and not self.foreign else []
        )
        if self.chunks:
            os.truncate(self.path, sum(map(len, lines[: 1 + len(self.chunks)])))
        else:
            self.path.write_bytes(head)

    def commit(self, chunks: Sequence[Chunk]) -> None:
        """Note that ``chunks`` are finished, once their bytes are on the disk."""
        sync(self.data)
        with open(self.path, "ab") as file:
            file.writelines(_line(chunk) for chunk in chunks)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Forget everything: the file is whole, or not worth keeping."""
        self.path.unlink(missing_ok=True)


def _line(chunk: Chunk) -> bytes:
    text = json.dumps(
        {**vars(chunk), "images": base64.b64encode(chunk.images.tobytes()).decode()}
    ).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def _chunks(lines: Sequence[bytes], size: int) -> Iterator[Chunk]:
    """The chunks of the ``lines`` up to the first that is damaged, such as one cut off, or names
    more than ``size`` bytes.
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
