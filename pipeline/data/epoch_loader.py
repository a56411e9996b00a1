"""The loader of a .beton file: an order, boxes and moves for its images -> batches of an epoch.

The files, the JPEG decoder and the resizer are FFCV's. The loop around them is not its ``Loader``,
which hangs after an error in its thread, hands out buffers that change later, draws random numbers
that cannot be repeated, and pads or drops samples.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.data.beton import REMEDY
from pipeline.data.manifest import Manifest
from pipeline.data.stored_images import StoredImages
from pipeline.data.view_plan import FLIP, HEIGHT, PLAN_COLUMNS
from pipeline.errors import UserError

log = logging.getLogger(__name__)

BATCHES_AHEAD = 3
"""Batches that are decoded, or being decoded, while the consumer works."""


class Batch(NamedTuple):
    """Images and labels that belong to the caller."""

    images: torch.Tensor
    """(B, 3, S, S) uint8, RGB, channels last in memory."""
    labels: torch.Tensor
    """(B,) int64."""
    indices: torch.Tensor
    """(B,) int64, the index of each sample in the .beton file."""
    targets: torch.Tensor | None = None
    """(B, C) float32, the shares of the classes in mixed images; None if no images are mixed."""


def unit_range(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Convert images (B, 3, S, S) uint8 to floats in [0, 1] on ``device``.

    They are channels last in memory, with which convolutions are fastest.
    """
    return (
        images.to(device, non_blocking=True)
        .to(torch.float32, memory_format=torch.channels_last)
        .div_(255)
    )


@dataclass(frozen=True)
class Visit:
    """The samples that a process visits in an epoch, and the way it shows them."""

    order: Callable[[int], np.ndarray]
    """epoch -> (n,) samples, in their order."""
    size: Callable[[int], int]
    """epoch -> side of the images in pixels."""
    boxes: Callable[[np.ndarray, np.ndarray, int, np.ndarray], np.ndarray]
    """(heights, widths, epoch, samples) -> (n, 4) boxes of the stored images to show."""
    moves: Callable[[int, int, np.ndarray], np.ndarray] | None = None
    """(size, epoch, samples) -> (n, 3) flip, down and right of ``StoredImages.decode``."""
    transform: Callable[[Batch, int], Batch] | None = None
    """(batch, epoch) -> batch; changes decoded images, in the loader's thread."""


class EpochLoader:
    """Batches of one .beton file, epoch by epoch.

    Args:
        path: the file, which ``open_manifest`` has checked.
        manifest: the manifest of the file.
        split: name of the file's split in the manifest.
        batch_size: images per batch; the last of an epoch may have fewer.
        workers: largest number of decoding threads; there are never more than processors.
        visit: the samples of this process, and the way they are shown.

    Attributes:
        samples: number of images of the whole split, all processes together.
        classes: names of the classes.
        batches_per_epoch: batches of this process in an epoch.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        split: str,
        batch_size: int,
        workers: int,
        visit: Visit,
    ):
        self.path, self.batch_size = path, batch_size
        self.samples, self.classes = manifest.splits[split].samples, manifest.classes
        self.batches_per_epoch = -(-len(visit.order(0)) // batch_size)
        self._visit = visit
        self._stored = StoredImages(path)
        # One thread for the loader's life: each new one would leave numba's and libjpeg's memory
        # for it behind.
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = ThreadPoolExecutor(
            1, f"decode {split}", _begin_thread, (threads(workers), device)
        )
        self._open = False

    @contextmanager
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Iterator[Batch]]:
        """Open ``epoch`` and iterate over its batches from number ``start`` on.

        Earlier batches are not decoded. Decoding ends when the block is left, in whatever way. A
        loader can have one open epoch at a time.

        Raises:
            UserError: a stored image cannot be decoded.
            RuntimeError: the loader's thread failed in another way; its error is the cause.
        """
        with self._batches(self._visit.order(epoch)[start * self.batch_size :], epoch) as batches:
            yield batches

    @contextmanager
    def select(self, samples: np.ndarray) -> Iterator[Iterator[Batch]]:
        """Iterate over batches of the ``samples`` (n,), in their order, as epoch 0 shows them.

        This ends and raises as ``epoch`` does.
        """
        with self._batches(samples, 0) as batches:
            yield batches

    @contextmanager
    def _batches(self, samples: np.ndarray, epoch: int) -> Iterator[Iterator[Batch]]:
        if self._open:
            raise RuntimeError(f"{self.path}: an epoch of this loader is open already")
        parts = (
            samples[begin : begin + self.batch_size]
            for begin in range(0, len(samples), self.batch_size)
        )
        ahead = (self._thread.submit(self._batch, part, epoch) for part in parts)
        pending = deque(islice(ahead, BATCHES_AHEAD))
        self._open = True
        try:
            yield self._in_turn(pending, ahead)
        finally:
            for future in pending:
                future.cancel()
            wait(pending)
            self._open = False

    def _in_turn(
        self, pending: deque[Future[Batch]], ahead: Iterator[Future[Batch]]
    ) -> Iterator[Batch]:
        """Yield the pending batches, and start another one for each."""
        while pending:
            batch = pending[0].result()
            pending.popleft()
            pending.extend(islice(ahead, 1))
            yield batch

    def _batch(self, samples: np.ndarray, epoch: int) -> Batch:
        try:
            size = self._visit.size(epoch)
            plan = np.zeros((len(samples), PLAN_COLUMNS), np.int32)
            plan[:, :FLIP] = self._visit.boxes(
                self._stored.heights[samples], self._stored.widths[samples], epoch, samples
            )
            if self._visit.moves:
                plan[:, FLIP:] = self._visit.moves(size, epoch, samples)
            images = torch.empty(
                len(samples), size, size, 3, dtype=torch.uint8, pin_memory=torch.cuda.is_available()
            )
            self._stored.decode(samples, plan, images.numpy())
            if (broken := samples[plan[:, HEIGHT] == 0]).size:
                raise UserError(
                    f"{self.path}: image {broken[0]} cannot be decoded; "
                    f"remove the folder and {REMEDY}"
                )
            labels = torch.from_numpy(self._stored.labels[samples])
            batch = Batch(images.permute(0, 3, 1, 2), labels, torch.from_numpy(samples.copy()))
            return self._visit.transform(batch, epoch) if self._visit.transform else batch
        except UserError:
            raise
        except Exception as error:
            raise RuntimeError(f"{self.path}: reading stopped: {error!r}") from error


def _begin_thread(workers: int, device: int | None) -> None:
    """Set numba's threads and the GPU in the loader's thread."""
    import numba

    numba.set_num_threads(workers)
    if device is not None:
        # Otherwise pinned memory would belong to the first GPU, which may be another process's.
        torch.cuda.set_device(device)


def threads(workers: int) -> int:
    """Return ``workers``, limited to the processors that this process may use."""
    import numba

    config: Any = numba.config
    available: int = min(len(os.sched_getaffinity(0)), config.NUMBA_NUM_THREADS)
    if workers > available:
        log.warning(
            "data.workers is %d, but this process may use only %d processors", workers, available
        )
    return min(workers, available)
