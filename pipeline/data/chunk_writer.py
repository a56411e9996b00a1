"""The writer of a .beton file's images, which gives each encoded chunk its place in the file.

A chunk's place follows from the chunks before it, so the file is the same for any number of
processes. FFCV's own writer hangs when an image is broken or a process dies; this one ends.
"""

import ctypes
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

from tqdm import tqdm

from pipeline.data import beton
from pipeline.data.chunk_journal import Chunk, ChunkJournal
from pipeline.data.encode import Encoded, Place, Stored, work
from pipeline.data.epoch_loader import threads
from pipeline.data.ffcv_library import load_ffcv
from pipeline.data.sources.split import Split
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe

log = logging.getLogger(__name__)

SYNC_SECONDS = 1
"""Seconds between two syncs, and so the most work that is lost when the machine fails."""

Message = Encoded | Stored | OSError


def write_chunks(
    path: Path, journal: ChunkJournal, split: Split, data: DataRecipe, page: int, name: str
) -> None:
    """Write all chunks of ``split`` to ``path`` that ``journal`` does not hold, and add them to it.

    Args:
        path: the .beton file, which is there.
        journal: the finished chunks of the file.
        split: the images.
        data: the recipe's data section.
        page: bytes of a page of the file.
        name: name of the split, for the progress bar.

    Raises:
        UserError: an image is broken and ``data.broken_images`` is fail, or a process was killed.
        OSError: the disk is full or failing.
    """
    chunks = -(-len(split) // data.chunk_size)
    if len(journal.chunks) == chunks:
        return
    # The writer processes are forked, so that they share the source and FFCV with this one.
    load_ffcv()
    fork = multiprocessing.get_context("fork")
    counter = fork.Value(ctypes.c_int64, len(journal.chunks))
    writer = _ChunkWriter(path, journal, split, data, page)
    processes: dict[Connection, ForkProcess] = {}
    try:
        for _ in range(min(threads(data.workers), chunks)):
            ours, theirs = fork.Pipe()
            processes[ours] = fork.Process(
                target=work, args=(os.getpid(), theirs, path, split, data, counter, chunks)
            )
            processes[ours].start()
            # Closed before the next process is made, so that only its own process keeps it open.
            theirs.close()
        with tqdm(
            total=len(split), initial=writer.images, desc=f"writing {name}", unit="image"
        ) as bar:
            for connection, message in _messages(processes, path):
                writer.take(connection, message)
                bar.update(writer.images - bar.n)
                bar.set_postfix_str(writer.size(), refresh=False)
    finally:
        for process in processes.values():
            if process.pid:
                process.kill()
                process.join()
        writer.close()


class _ChunkWriter:
    """The state of a file that is being written.

    Attributes:
        images: images of the source that have been written or left out.
    """

    def __init__(
        self, path: Path, journal: ChunkJournal, split: Split, data: DataRecipe, page: int
    ):
        self.journal = journal
        self.split = split
        self.page = page
        self.chunk_size = data.chunk_size
        self.refuse_broken = data.broken_images == "fail"
        self.first = beton.first_page(len(split), page)
        self.end = journal.chunks[-1].end if journal.chunks else self.first
        # The numbers of the next chunks to place, and to add to the journal.
        self.next_to_place = len(journal.chunks)
        self.next_to_commit = len(journal.chunks)
        self.images = sum(len(chunk.images) + len(chunk.broken) for chunk in journal.chunks)
        # Chunks by number: encoded before the chunks in front of them, being written, and written.
        self.waiting: dict[int, tuple[Connection, Encoded]] = {}
        self.writing: dict[int, Chunk] = {}
        self.written: dict[int, Chunk] = {}
        self.synced = time.monotonic()
        self.thread = ThreadPoolExecutor(1)
        self.syncing: Future[None] | None = None

    def take(self, connection: Connection, message: Message) -> None:
        """Act on a message of a writer process."""
        if isinstance(message, OSError):
            raise message
        if isinstance(message, Encoded):
            self._report(message)
            self.waiting[message.number] = connection, message
            while self.next_to_place in self.waiting:
                self._place(*self.waiting.pop(self.next_to_place))
        else:
            self._note(message)

    def size(self) -> str:
        """Return the bytes so far, and an estimate of all, in words."""
        total = len(self.split)
        so_far = self.end - self.first
        placed = min(self.next_to_place * self.chunk_size, total)
        return f"{so_far / 1e9:.2f} of about {so_far / max(placed, 1) * total / 1e9:.2f} GB"

    def close(self) -> None:
        """Add to the journal what has been written, whatever the reason for the end."""
        self._commit()
        self.thread.shutdown()

    def _report(self, encoded: Encoded) -> None:
        """Log the broken images of a chunk, and refuse them if the recipe says so."""
        for index, reason in encoded.broken:
            log.warning("%s: %s", self.split.describe(index), reason)
        if encoded.broken and self.refuse_broken:
            index, reason = encoded.broken[0]
            others = len(encoded.broken) - 1
            more = f" (and {others} more, listed above)" if others else ""
            raise UserError(
                f"{self.split.describe(index)}: is not a readable image: {reason}{more}; "
                "repair it, or leave such images out with data.broken_images=skip: "
                "the same command then continues"
            )

    def _place(self, connection: Connection, encoded: Encoded) -> None:
        """Tell a process where the chunk that it has encoded belongs."""
        addresses, end = beton.place(self.end, encoded.images["size"], self.page)
        encoded.images["data_ptr"] = addresses
        self.writing[encoded.number] = Chunk(self.end, end, encoded.images, encoded.broken, "")
        # If the process has just died, the end of its pipe shows that in a moment.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(Place(self.end, addresses, end))
        self.end = end
        self.next_to_place += 1

    def _note(self, stored: Stored) -> None:
        """Note that a chunk has been written, and sync if the last sync is long ago."""
        chunk = replace(self.writing.pop(stored.number), xxh64=stored.xxh64)
        self.written[stored.number] = chunk
        self.images += len(chunk.images) + len(chunk.broken)
        idle = self.syncing is None or self.syncing.done()
        if idle and time.monotonic() - self.synced > SYNC_SECONDS:
            self._commit()

    def _commit(self) -> None:
        """Add the written chunks to the journal, in a thread, as syncing takes time."""
        if self.syncing is not None:
            self.syncing.result()
        finished = []
        while self.next_to_commit in self.written:
            finished.append(self.written.pop(self.next_to_commit))
            self.next_to_commit += 1
        self.journal.chunks += finished
        self.synced = time.monotonic()
        self.syncing = self.thread.submit(self.journal.commit, finished)


def _messages(
    processes: dict[Connection, ForkProcess], path: Path
) -> Iterator[tuple[Connection, Message]]:
    """Yield all messages of the processes, until all have ended.

    Raises:
        UserError: a process was killed.
        RuntimeError: a process has failed.
    """
    speaking = list(processes)
    while speaking:
        for connection in wait(speaking):
            assert isinstance(connection, Connection)
            try:
                message: Message = connection.recv()
            except (EOFError, ConnectionResetError):
                speaking.remove(connection)
                _check_exit(processes[connection], path)
            else:
                yield connection, message


def _check_exit(process: ForkProcess, path: Path) -> None:
    """Wait for the end of a process, and check that it did not fail."""
    process.join()
    code = process.exitcode
    if not code:
        return
    if code > 0:
        raise RuntimeError(f"{path}: a writer process failed; its error is above") from None
    raise UserError(
        f"{path}: a writer process was ended by signal {-code} (9 often means that memory was "
        "short); free the resource and prepare again: it continues"
    ) from None
