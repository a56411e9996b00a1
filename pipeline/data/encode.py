"""The processes that decode, resize, encode and store chunks of images.

Each process encodes a chunk, announces its size, encodes the next one, and only then stores the
first at the place that it was given. So it is one chunk ahead of its place and does not wait.
"""

import ctypes
import errno
import os
import signal
from ctypes.util import find_library
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from pipeline.data import beton
from pipeline.data.images import BrokenImage
from pipeline.data.sources.split import Split
from pipeline.data.stored_size import fit
from pipeline.recipe.schema import DataRecipe

MACHINE_ERRORS = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
"""Errors in reading a file that the machine causes, and not the file."""
PR_SET_PDEATHSIG = 1
"""Option of prctl(2): the signal that a process gets when its parent dies."""


class Encoded(NamedTuple):
    """A chunk without its place; the bytes of its images stay with the process that made it."""

    number: int
    """Number of the chunk."""
    images: np.ndarray
    """(N,) beton.STORED_IMAGE, with no data_ptr yet."""
    broken: tuple[tuple[int, str], ...]
    """Index in the source and error of each image that is left out."""


class Place(NamedTuple):
    """The place of a chunk in the file."""

    begin: int
    """Address at which the chunk begins."""
    addresses: np.ndarray
    """(N,) addresses of the images."""
    end: int
    """Address at which the chunk ends."""


class Stored(NamedTuple):
    """A chunk that has been written."""

    number: int
    """Number of the chunk."""
    xxh64: str
    """XXH3-64 of its bytes."""


def work(
    parent: int,
    connection: Connection,
    path: Path,
    split: Split,
    data: DataRecipe,
    counter: Any,
    chunks: int,
) -> None:
    """Run a writer process, which ends with its parent and leaves Ctrl-C to it.

    Args:
        parent: process id of the parent.
        connection: where Encoded, Stored or an OSError is sent, and a Place is received.
        path: the .beton file, which is there.
        split: the images.
        data: the recipe's data section.
        counter: number of the next chunk to encode, shared by all writer processes.
        chunks: number of all chunks.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(find_library("c")).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the line above.
    if os.getppid() != parent:
        return
    encoder = _Encoder(split, data)
    # The chunk that is encoded and announced, but not placed yet.
    ahead: tuple[int, list[np.ndarray]] | None = None
    with open(path, "r+b", buffering=0) as file:
        try:
            while (number := _next(counter)) < chunks:
                encoded, content = encoder.encode(number)
                if ahead:
                    _store(connection, file.fileno(), *ahead)
                connection.send(encoded)
                ahead = number, content
            if ahead:
                _store(connection, file.fileno(), *ahead)
        except OSError as error:
            connection.send(error)


def _next(counter: Any) -> int:
    """Return the value of the shared counter, and increase it."""
    with counter.get_lock():
        number: int = counter.value
        counter.value += 1
    return number


def _store(connection: Connection, file: int, number: int, content: list[np.ndarray]) -> None:
    """Receive the place of a chunk, write its images there, and report its hash."""
    place: Place = connection.recv()
    region = memoryview(bytearray(place.end - place.begin))
    for address, image in zip(place.addresses.tolist(), content, strict=True):
        region[address - place.begin :][: len(image)] = image.data
    written = 0
    while written < len(region):
        written += os.pwrite(file, region[written:], place.begin + written)
    connection.send(Stored(number, xxhash.xxh3_64_hexdigest(region)))


class _Encoder:
    """The images of a split -> the bytes that are stored."""

    def __init__(self, split: Split, data: DataRecipe):
        from ffcv.fields import RGBImageField

        self.split = split
        self.data = data
        share = {"raw": 0.0, "jpg": 1.0, "proportion": data.compress_probability}[data.write_mode]
        # A function of the image's index alone.
        self.as_jpg = np.random.default_rng(0).random(len(split)) < share
        self.fields = {
            as_jpg: RGBImageField("jpg" if as_jpg else "raw", jpeg_quality=data.jpeg_quality)
            for as_jpg in (False, True)
        }

    def encode(self, number: int) -> tuple[Encoded, list[np.ndarray]]:
        """Return chunk ``number``, and the bytes of its images."""
        begin = number * self.data.chunk_size
        indices = range(begin, min(begin + self.data.chunk_size, len(self.split)))
        images = np.zeros(len(indices), beton.STORED_IMAGE)
        content: list[np.ndarray] = []
        broken: list[tuple[int, str]] = []
        for index in indices:
            try:
                image = self.split.read(index)
            except (BrokenImage, OSError) as error:
                if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
                    raise
                broken.append((index, " ".join(str(error).split()) or type(error).__name__))
                continue
            pixels = fit(image, self.data, self.split.fixed_size)
            slot = images[len(content) : len(content) + 1]
            stored = self._bytes(slot, pixels, bool(self.as_jpg[index]))
            slot["source"] = index
            slot["size"] = len(stored)
            content.append(stored)
        return Encoded(number, images[: len(content)].copy(), tuple(broken)), content

    def _bytes(self, slot: np.ndarray, pixels: np.ndarray, as_jpg: bool) -> np.ndarray:
        """Return the bytes that FFCV's field stores; set mode, height and width in ``slot``."""
        stored = []

        def allocate(size: int) -> tuple[int, np.ndarray]:
            stored.append(np.empty(size, np.uint8))
            return 0, stored[0]

        self.fields[as_jpg].encode(slot, pixels, allocate)
        return stored[0]
