"""Processes that decode, resize, encode and store chunks of images, and the one that gives each
chunk its place in the file.

A chunk's place follows from the chunks before it, so that the file is the same for any number of
processes; each process is one chunk ahead of its place and does not wait. FFCV's own writer waits
for ever when an image is broken or a process dies; this one ends.
"""

import ctypes
import errno
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from ctypes.util import find_library
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from tqdm import tqdm

from pipeline.data import beton
from pipeline.data.chunk_journal import Chunk, ChunkJournal
from pipeline.data.epoch_loader import threads
from pipeline.data.ffcv_library import load_ffcv
from pipeline.data.images import BrokenImage
from pipeline.data.sources import Split
from pipeline.data.stored_size import fit
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe

log = logging.getLogger(__name__)

# at most so much work is lost when the machine fails
SYNC_SECONDS = 1
# errors of the machine
NOT_THE_IMAGE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
PR_SET_PDEATHSIG = 1
# writer processes share the source with this one
FORK = multiprocessing.get_context("fork")


class Encoded(NamedTuple):
    """A chunk without its place; its images' bytes stay with the process that has made it."""

    number: int
    images: np.ndarray
    """(N,) beton.STORED_IMAGE, no data_ptr yet."""
    broken: tuple[tuple[int, str], ...]


class Place(NamedTuple):
    """Where a chunk belongs."""

    begin: int
    addresses: np.ndarray  # (N,)
    end: int


class Stored(NamedTuple):
    """A chunk that has been written."""

    number: int
    xxh64: str


def write_chunks(
    path: Path, journal: ChunkJournal, split: Split, data: DataRecipe, page: int, name: str
) -> None:
    """Write all chunks of ``split`` to ``path`` that are not in ``journal`` yet, and note them
    there.

    Raises:
        UserError: an image is broken and ``data.broken_images`` is fail; a process was killed.
        OSError: the disk is full or failing.
    """
    chunks = -(-len(split) // data.chunk_size)
    if len(journal.chunks) == chunks:
        return
    # Before the processes are made, which inherit it.
    load_ffcv()
    counter = FORK.Value(ctypes.c_int64, len(journal.chunks))
    writing = _Writing(path, journal, split, data, page)
    processes: dict[Connection, ForkProcess] = {}
    try:
        for _ in range(min(threads(data.workers), chunks)):
            ours, theirs = FORK.Pipe()
            processes[ours] = FORK.Process(
                target=_work, args=(os.getpid(), theirs, path, split, data, counter, chunks)
            )
            processes[ours].start()
            # before the next process is made: only the one that it belongs to keeps it open
            theirs.close()
        with tqdm(
            total=len(split), initial=writing.images, desc=f"writing {name}", unit="image"
        ) as bar:
            for connection, message in _messages(processes, path):
                writing.take(connection, message)
                bar.update(writing.images - bar.n)
                bar.set_postfix_str(writing.size(len(split)), refresh=False)
    finally:
        for process in processes.values():
            if process.pid:
                process.kill()
                process.join()
        writing.close()


class _Writing:
    """What is known of a file while it is written.

    Attributes:
        images: how many of the source have been written or left out.
    """

    def __init__(self, path: Path, journal: ChunkJournal, split: Split, data: DataRecipe, page: int):
        self.journal, self.split, self.page = journal, split, page
        self.chunk_size, self.fatal = data.chunk_size, data.broken_images == "fail"
        self.first = beton.first_page(len(split), page)
        self.end = journal.chunks[-1].end if journal.chunks else self.first
        # numbers of the next chunks to place and to note
        self.placed = self.committed = len(journal.chunks)
        self.images = sum(len(chunk.images) + len(chunk.broken) for chunk in journal.chunks)
        # encoded before the chunks in front of them
        self.waiting: dict[int, tuple[Connection, Encoded]] = {}
        self.writing: dict[int, Chunk] = {}
        self.written: dict[int, Chunk] = {}
        self.synced = time.monotonic()
        self.thread = ThreadPoolExecutor(1)
        self.syncing: Future | None = None

    def take(self, connection: Connection, message: Any) -> None:
        """Act on what a process says."""
        if isinstance(message, OSError):
            raise message
        if isinstance(message, Encoded):
            self._report(message)
            self.waiting[message.number] = connection, message
            while self.placed in self.waiting:
                self._place(*self.waiting.pop(self.placed))
        else:
            chunk = self.writing.pop(message.number)
            self.written[message.number] = Chunk(
                chunk.begin, chunk.end, chunk.images, chunk.broken, message.xxh64
            )
            self.images += len(chunk.images) + len(chunk.broken)
            if time.monotonic() - self.synced > SYNC_SECONDS and (
                self.syncing is None or self.syncing.done()
            ):
                self._commit()

    def size(self, total: int) -> str:
        """Bytes so far, and an estimate of all, in words."""
        so_far, placed = self.end - self.first, min(self.placed * self.chunk_size, total)
        return f"{so_far / 1e9:.2f} of about {so_far / max(placed, 1) * total / 1e9:.2f} GB"

    def close(self) -> None:
        """Note what has been written, whatever the reason for the end."""
        self._commit()
        self.thread.shutdown()

    def _report(self, message: Encoded) -> None:
        for index, reason in message.broken:
            log.warning("%s: %s", self.split.describe(index), reason)
        if message.broken and self.fatal:
            index, reason = message.broken[0]
            more = (
                f" (and {len(message.broken) - 1} more, listed above)"
                if len(message.broken) > 1
                else ""
            )
            raise UserError(
                f"{self.split.describe(index)}: is not a readable image: {reason}{more}; repair it, or leave such images out with "
                "data.broken_images=skip: the same command then continues"
            )

    def _place(self, connection: Connection, encoded: Encoded) -> None:
        addresses, end = beton.place(self.end, encoded.images["size"], self.page)
        encoded.images["data_ptr"] = addresses
        self.writing[encoded.number] = Chunk(self.end, end, encoded.images, encoded.broken, "")
        # it has just died, and its end of the pipe will say so
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(Place(self.end, addresses, end))
        self.end, self.placed = end, self.placed + 1

    def _commit(self) -> None:
        if self.syncing is not None:
            self.syncing.result()
        finished = []
        while self.committed in self.written:
            finished.append(self.written.pop(self.committed))
            self.committed += 1
        self.journal.chunks += finished
        self.synced = time.monotonic()
        self.syncing = self.thread.submit(self.journal.commit, finished)


def _messages(
    processes: dict[Connection, ForkProcess], path: Path
) -> Iterator[tuple[Connection, Any]]:
    """Everything that the processes say, until all have ended.

    Raises:
        UserError: one was killed.
        RuntimeError: one has failed.
    """
    speaking = list(processes)
    while speaking:
        for connection in wait(speaking):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, ConnectionResetError):
                speaking.remove(connection)
                processes[connection].join()
                if code := processes[connection].exitcode:
                    if code > 0:
                        raise RuntimeError(
                            f"{path}: a writer process failed; its error is above"
                        ) from None
                    raise UserError(
                        f"{path}: a writer process was ended by signal {-code} (9 often means that memory was short); "
                        "free the resource and prepare again: it continues"
                    ) from None
            else:
                yield connection, message


def _work(
    parent: int,
    connection: Connection,
    path: Path,
    split: Split,
    data: DataRecipe,
    counter: Any,
    chunks: int,
) -> None:
    """A writer process. It does not outlive its parent and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(find_library("c")).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # it died before the line above
    if os.getppid() != parent:
        return
    encoder = _Encoder(split, data)
    # encoded and announced, not yet placed
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
    with counter.get_lock():
        counter.value += 1
        return counter.value - 1


def _store(connection: Connection, file: int, number: int, content: list[np.ndarray]) -> None:
    place = connection.recv()
    region = memoryview(bytearray(place.end - place.begin))
    for address, image in zip(place.addresses.tolist(), content, strict=True):
        region[address - place.begin :][: len(image)] = image.data
    written = 0
    while written < len(region):
        written += os.pwrite(file, region[written:], place.begin + written)
    connection.send(Stored(number, xxhash.xxh3_64_hexdigest(region)))


class _Encoder:
    """Images of a split -> the bytes that are stored."""

    def __init__(self, split: Split, data: DataRecipe):
        self.split, self.data = split, data
        share = {"raw": 0.0, "jpg": 1.0, "proportion": data.compress_probability}[data.write_mode]
        # a function of the image's number only
        self.as_jpg = np.random.default_rng(0).random(len(split)) < share
        from ffcv.fields import RGBImageField

        self.fields = {
            as_jpg: RGBImageField("jpg" if as_jpg else "raw", jpeg_quality=data.jpeg_quality)
            for as_jpg in (False, True)
        }

    def encode(self, number: int) -> tuple[Encoded, list[np.ndarray]]:
        """Chunk ``number``, and the bytes of its images."""
        indices = range(
            number * self.data.chunk_size, min((number + 1) * self.data.chunk_size, len(self.split))
        )
        images = np.zeros(len(indices), beton.STORED_IMAGE)
        content: list[np.ndarray] = []
        broken: list[tuple[int, str]] = []
        for index in indices:
            try:
                image = self.split.read(index)
            except (BrokenImage, OSError) as error:
                if isinstance(error, OSError) and error.errno in NOT_THE_IMAGE:
                    raise
                broken.append((index, " ".join(str(error).split()) or type(error).__name__))
                continue
            pixels = fit(image, self.data, self.split.fixed_size)
            slot = images[len(content) : len(content) + 1]
            content.append(self._bytes(slot, pixels, bool(self.as_jpg[index])))
            slot["source"], slot["size"] = index, len(content[-1])
        return Encoded(number, images[: len(content)].copy(), tuple(broken)), content

    def _bytes(self, slot: np.ndarray, pixels: np.ndarray, as_jpg: bool) -> np.ndarray:
        """What FFCV's field stores of an image; its mode, height and width go to ``slot``."""
        stored = []

        def allocate(size: int) -> tuple[int, np.ndarray]:
            stored.append(np.empty(size, np.uint8))
            return 0, stored[0]

        self.fields[as_jpg].encode(slot, pixels, allocate)
        return stored[0]
