"""Loaders: a prepared folder and a place in the world -> batches, in an order that no thread, rank
or restart can change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.data import augment, sampling
from pipeline.data.epoch_loader import Batch, EpochLoader
from pipeline.data.manifest import Manifest, open_manifest
from pipeline.data.staging import readable_file
from pipeline.data.stored_images import StoredImages
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.recipe.schema import Recipe, training_size


def train_loader(recipe: Recipe, world: World, micro_batch: int) -> EpochLoader:
    """Shuffled and augmented training batches of ``micro_batch`` images for process ``world.rank``.

    An epoch is a permutation of the samples, cut into global batches without the incomplete last
    one; micro batch k of rank r is ``permutation[(k * world.size + r) * micro_batch
    :][:micro_batch]``, so every world size sees the same global batches.

    Raises:
        UserError: files missing, damaged or of another data set; fewer images than a global batch;
            micro batches that do not add up to a global batch, or are odd where images are mixed.
    """
    data, global_batch = recipe.data, recipe.training.global_batch_size
    manifest = _manifest(recipe)
    samples = manifest.splits["train"].samples
    whole = samples // global_batch * global_batch
    if not whole:
        raise UserError(
            f"training.global_batch_size is {global_batch}, but {data.folder} has only {samples} training images"
        )
    if global_batch % (micro_batch * world.size):
        raise UserError(
            f"training.global_batch_size {global_batch} is not a multiple of micro batch {micro_batch} x {world.size} processes"
        )
    augmentation = _Augmentation(recipe, manifest)
    if augmentation.mixes and micro_batch % 2:
        raise UserError(
            f"data.mixup_alpha and cutmix_alpha mix neighbours, so micro batches must be even, but {global_batch} images on "
            f"{world.size} processes are micro batches of {micro_batch}: choose training.micro_batch_size or the number of processes"
        )
    path = readable_file(data, manifest, "train")
    shuffled = _shuffle(recipe, path, samples)

    def order(epoch: int) -> np.ndarray:
        return (
            shuffled(epoch)[:whole].reshape(-1, world.size, micro_batch)[:, world.rank].reshape(-1)
        )

    return EpochLoader(
        path,
        manifest,
        "train",
        micro_batch,
        data.workers,
        order,
        augmentation.boxes,
        augmentation.moves,
        augmentation.transform,
        augmentation.size,
    )


def _shuffle(recipe: Recipe, path: Path, samples: int) -> Callable[[int], np.ndarray]:
    """epoch -> (samples,) the order of all images."""
    window, global_batch, seed = (
        recipe.data.shuffle_pages,
        recipe.training.global_batch_size,
        recipe.seed,
    )
    if window is None:
        return lambda epoch: sampling.permutation(seed, epoch, samples)
    pages = StoredImages(path).pages
    together = samples * window // len(np.unique(pages))
    if together < global_batch:
        raise UserError(
            f"data.shuffle_pages is {window}: so many pages of {path} hold some {together} images, fewer than "
            f"training.global_batch_size {global_batch}, so that the same ones would meet in every epoch; set it higher"
        )
    return lambda epoch: sampling.page_permutation(seed, epoch, pages, window)


@dataclass(frozen=True)
class _Augmentation:
    """What a recipe does to training images, as an ``EpochLoader`` asks for it."""

    recipe: Recipe
    manifest: Manifest

    @property
    def mixes(self) -> bool:
        return self.recipe.data.mixup_alpha > 0 or self.recipe.data.cutmix_alpha > 0

    def size(self, epoch: int) -> int:
        return training_size(self.recipe.data, epoch, self.recipe.training.epochs)

    def boxes(
        self, heights: np.ndarray, widths: np.ndarray, epoch: int, samples: np.ndarray
    ) -> np.ndarray:
        if self.manifest.fixed_size:
            return sampling.whole_boxes(heights, widths)
        return sampling.random_boxes(heights, widths, self.recipe.seed, epoch, samples)

    def moves(self, size: int, epoch: int, samples: np.ndarray) -> np.ndarray:
        data = self.recipe.data
        return sampling.moves(
            self.recipe.seed, epoch, samples, data.flip, data.crop_padding * size // data.image_size
        )

    def transform(self, batch: Batch, epoch: int) -> Batch:
        data, images, targets = self.recipe.data, batch.images, None
        draw = partial(sampling.uniform, self.recipe.seed, epoch, batch.indices.numpy())
        if data.rand_augment_operations:
            images = augment.rand_augment(
                images, data.rand_augment_operations, data.rand_augment_magnitude, draw
            )
        if data.color_jitter:
            images = augment.color_jitter(images, data.color_jitter, draw)
        if data.random_erasing:
            images = augment.random_erasing(images, data.random_erasing, draw)
        if self.mixes:
            classes = len(self.manifest.classes)
            images, targets = augment.mix(
                images, batch.labels, classes, data.mixup_alpha, data.cutmix_alpha, draw
            )
        return batch._replace(images=images, targets=targets)


def eval_loader(recipe: Recipe, world: World, batch_size: int, split: str = "val") -> EpochLoader:
    """Every image of ``split`` exactly once over all processes, unchanged and in order: rank r has
    the samples r, r + size, ...

    Processes may have unequal numbers of batches: no collective may stand inside the loop over
    them.

    Raises:
        UserError: files missing, damaged or of another data set.
    """
    manifest = _manifest(recipe)

    def order(epoch: int) -> np.ndarray:
        return np.arange(world.rank, manifest.splits[split].samples, world.size)

    def boxes(
        heights: np.ndarray, widths: np.ndarray, epoch: int, chosen: np.ndarray
    ) -> np.ndarray:
        return (
            sampling.whole_boxes(heights, widths)
            if manifest.fixed_size
            else sampling.centre_boxes(heights, widths)
        )

    path = readable_file(recipe.data, manifest, split)
    size = recipe.data.evaluated_size
    return EpochLoader(
        path,
        manifest,
        split,
        batch_size,
        recipe.data.workers,
        order,
        boxes,
        size=lambda epoch: size,
    )


def _manifest(recipe: Recipe) -> Manifest:
    manifest = open_manifest(recipe.data.folder)
    manifest.require(recipe.data)
    return manifest
