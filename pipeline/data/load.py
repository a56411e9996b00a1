"""Loaders: a prepared folder and a place in the world -> batches, in an order that no thread, rank or restart can change.

FFCV decodes ahead in a thread of its own. What it leaves open is closed here: an error in that thread reaches the consumer, the
thread ends with the epoch however the epoch ends, and batches do not change after they were handed out.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import NamedTuple

import numba
import numpy as np
import torch
from ffcv.fields.basics import IntDecoder
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.transforms import ToTensor

from pipeline.data import augment
from pipeline.data.decode import HEIGHT, BoxDecoder
from pipeline.data.manifest import REMEDY, Manifest, open_manifest
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.recipe import Recipe

POLL_SECONDS = 0.5  # how often a waiting consumer looks whether FFCV's thread is still alive


class Batch(NamedTuple):
    """Images and labels that belong to the caller."""

    images: torch.Tensor  # (B, 3, S, S) uint8, RGB, contiguous
    labels: torch.Tensor  # (B,) int64
    indices: torch.Tensor  # (B,) int64: number of each sample in the .beton file


def unit_range(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Images (B, 3, S, S) uint8 as floats in [0, 1] on ``device``; channels last in memory where convolutions want it so."""
    images = images.to(device, non_blocking=True).float().div_(255)
    return images.to(memory_format=torch.channels_last) if device.type == "cuda" else images


class EpochLoader:
    """Batches of one .beton file, epoch by epoch.

    Args:
        path: the file. It must have been checked (``open_manifest``): FFCV hangs on an unfinished one.
        manifest: what it holds.
        split: its entry there.
        batch_size: images per batch; the last of an epoch may have fewer.
        workers: decoding threads, at most; never more than processors.
        order: epoch -> (n,) the samples that this process visits.
        boxes: (heights, widths, epoch, samples) -> (n, 4) the part of each stored image to show.
        transform: (images (B, 3, S, S) uint8, epoch, samples) -> images, the same shape, contiguous.

    Attributes:
        samples: images of the whole split, all processes together.
        classes: their names.
        batches_per_epoch: batches of this process in an epoch.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        split: str,
        batch_size: int,
        workers: int,
        order: Callable[[int], np.ndarray],
        boxes: Callable[[np.ndarray, np.ndarray, int, np.ndarray], np.ndarray],
        transform: Callable[[torch.Tensor, int, np.ndarray], torch.Tensor] | None = None,
    ):
        self.path, self.batch_size = path, batch_size
        self.samples, self.classes = manifest.splits[split].samples, manifest.classes
        self.batches_per_epoch = -(-len(order(0)) // batch_size)
        self._order, self._choose_boxes, self._transform = order, boxes, transform
        self._boxes = np.zeros((self.samples, 4), np.int32)
        self._open = False
        pipelines = {"image": [BoxDecoder(self._boxes, manifest.image_size), ToTensor()], "label": [IntDecoder(), ToTensor()]}
        torch_threads = torch.get_num_threads()
        self._ffcv = Loader(str(path), batch_size, threads(workers), os_cache=True, pipelines=pipelines)
        torch.set_num_threads(torch_threads)  # FFCV has set it to its own number
        stored = self._ffcv.reader.metadata["f0"]
        self._heights, self._widths = stored["height"].astype(np.int64), stored["width"].astype(np.int64)

    @contextmanager
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Iterator[Batch]]:
        """An iterator over the batches of ``epoch`` from number ``start`` on; earlier ones are not decoded.

        FFCV's thread has ended when the block is left, in whatever way. One epoch of a loader can be open at a time.

        Raises:
            UserError: a stored image cannot be decoded.
            RuntimeError: FFCV's thread failed; its error is the cause.
        """
        with self._visit(self._order(epoch)[start * self.batch_size :], epoch) as batches:
            yield batches

    @contextmanager
    def select(self, samples: np.ndarray) -> Iterator[Iterator[Batch]]:
        """Batches of the ``samples`` (n,) in the given order, as epoch 0 would show them. Ends and raises as ``epoch`` does."""
        with self._visit(samples, 0) as batches:
            yield batches

    @contextmanager
    def _visit(self, samples: np.ndarray, epoch: int) -> Iterator[Iterator[Batch]]:
        if self._open:
            raise RuntimeError(f"{self.path}: an epoch of this loader is open already")
        self._boxes[samples] = self._choose_boxes(self._heights[samples], self._widths[samples], epoch, samples)
        torch_threads = torch.get_num_threads()
        iterator = _EpochThread(self._ffcv, samples)
        self._open = True
        try:
            yield self._batches(iterator, epoch, samples, torch_threads)
        finally:
            iterator.shut()
            torch.set_num_threads(torch_threads)
            self._open = False

    def _batches(self, iterator: "_EpochThread", epoch: int, samples: np.ndarray, torch_threads: int) -> Iterator[Batch]:
        for begin in range(0, len(samples), self.batch_size):
            images, labels = iterator.take()
            if begin == 0:
                torch.set_num_threads(torch_threads)  # FFCV's thread has set it to its own number when it began
            chosen = samples[begin : begin + self.batch_size]
            if (broken := chosen[self._boxes[chosen, HEIGHT] == 0]).size:
                raise UserError(f"{self.path}: image {broken[0]} cannot be decoded; remove the folder and {REMEDY}")
            # FFCV's buffers are used again a few batches later, so everything is copied out of them.
            images = images.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)  # (B, S, S, 3) -> (B, 3, S, S)
            if self._transform:
                images = self._transform(images, epoch, chosen)
            yield Batch(images, labels[:, 0].clone(), torch.from_numpy(chosen.copy()))


class _EpochThread(EpochIterator):
    """FFCV's decoding thread, made to report its end."""

    failure: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # kept for the consumer, who would otherwise wait for ever
            self.failure = error

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next (images (B, S, S, 3), labels (B, 1)), views of FFCV's buffers."""
        while True:
            alive = self.is_alive()
            try:
                return self.output_queue.get(timeout=POLL_SECONDS if alive else 0)[1]
            except Empty:
                if not alive:
                    raise RuntimeError(f"{self.loader.fname}: reading stopped: {self.failure!r}") from self.failure

    def shut(self) -> None:
        """End the thread and wait for its end; emptying the queue frees it where it waits for room."""
        self.close()
        while self.is_alive():
            try:
                self.output_queue.get(timeout=0.02)
            except Empty:
                pass
        self.join()


def train_loader(recipe: Recipe, world: World, micro_batch: int) -> EpochLoader:
    """Shuffled and augmented training batches of ``micro_batch`` images for process ``world.rank``.

    An epoch is a permutation of the samples, cut into global batches without the incomplete last one; micro batch k of rank r is
    ``permutation[(k * world.size + r) * micro_batch :][:micro_batch]``, so every world size sees the same global batches.

    Raises:
        UserError: files missing, damaged or of another data set; fewer images than a global batch; micro batches that do not
            add up to a global batch.
    """
    data, seed, global_batch = recipe.data, recipe.seed, recipe.training.global_batch_size
    manifest = _manifest(recipe)
    samples = manifest.splits["train"].samples
    whole = samples // global_batch * global_batch
    if not whole:
        raise UserError(f"training.global_batch_size is {global_batch}, but {data.folder} has only {samples} training images")
    if global_batch % (micro_batch * world.size):
        raise UserError(
            f"training.global_batch_size {global_batch} is not a multiple of micro batch {micro_batch} x {world.size} processes"
        )

    def order(epoch: int) -> np.ndarray:
        shuffled = augment.permutation(seed, epoch, samples)[:whole]
        return shuffled.reshape(-1, world.size, micro_batch)[:, world.rank].reshape(-1)

    def boxes(heights: np.ndarray, widths: np.ndarray, epoch: int, chosen: np.ndarray) -> np.ndarray:
        if manifest.fixed_size:
            return augment.whole_boxes(heights, widths)
        return augment.random_boxes(heights, widths, seed, epoch, chosen)

    def transform(images: torch.Tensor, epoch: int, chosen: np.ndarray) -> torch.Tensor:
        return augment.flip_and_shift(images, seed, epoch, chosen, data.flip, data.crop_padding)

    augmented = transform if data.flip or data.crop_padding else None
    path = data.folder / manifest.splits["train"].file
    return EpochLoader(path, manifest, "train", micro_batch, data.workers, order, boxes, augmented)


def eval_loader(recipe: Recipe, world: World, batch_size: int, split: str = "val") -> EpochLoader:
    """Every image of ``split`` exactly once over all processes, unchanged and in order: rank r has the samples r, r + size, ...

    Processes may have unequal numbers of batches: no collective may stand inside the loop over them.

    Raises:
        UserError: files missing, damaged or of another data set.
    """
    manifest = _manifest(recipe)

    def order(epoch: int) -> np.ndarray:
        return np.arange(world.rank, manifest.splits[split].samples, world.size)

    def boxes(heights: np.ndarray, widths: np.ndarray, epoch: int, chosen: np.ndarray) -> np.ndarray:
        return augment.whole_boxes(heights, widths) if manifest.fixed_size else augment.centre_boxes(heights, widths)

    path = recipe.data.folder / manifest.splits[split].file
    return EpochLoader(path, manifest, split, batch_size, recipe.data.workers, order, boxes)


def threads(workers: int) -> int:
    """``workers``, but no more than the processors this process may use: FFCV refuses to start with more."""
    available = min(len(os.sched_getaffinity(0)), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if workers > available:
        warnings.warn(f"data.workers is {workers}, but this process may use only {available} processors", stacklevel=2)
    return min(workers, available)


def _manifest(recipe: Recipe) -> Manifest:
    manifest = open_manifest(recipe.data.folder)
    manifest.require(recipe.data)
    return manifest
