"""The loaders of a run: prepared data and a place in the world -> batches.

The order of images is decided here; threads, ranks and restarts cannot change it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.data import augment, sampling
from pipeline.data.epoch_loader import Batch, EpochLoader, Visit
from pipeline.data.manifest import Manifest
from pipeline.data.prepared import PreparedData
from pipeline.data.stored_images import StoredImages
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.recipe.schedules import training_size
from pipeline.recipe.schema import Recipe


def train_loader(
    recipe: Recipe, prepared: PreparedData, world: World, micro_batch: int
) -> EpochLoader:
    """Make the loader of shuffled and augmented training batches of this process.

    An epoch is a permutation of the samples, cut into global batches without the incomplete last
    one. Micro batch k of rank r is
    ``permutation[(k * world.size + r) * micro_batch :][:micro_batch]``, so that every world size
    sees the same global batches.

    Args:
        recipe: the recipe, for batch size, augmentation and seed.
        prepared: the data.
        world: this process among all.
        micro_batch: images per batch.

    Raises:
        UserError: there are fewer images than a global batch, micro batches do not add up to one or
            are odd although images are mixed, or a copy on the node cannot be made.
    """
    data, global_batch = recipe.data, recipe.training.global_batch_size
    samples = prepared.split("train").samples
    whole = samples // global_batch * global_batch
    if not whole:
        raise UserError(
            f"training.global_batch_size is {global_batch}, but {data.folder} has only {samples} "
            "training images"
        )
    if global_batch % (micro_batch * world.size):
        raise UserError(
            f"training.global_batch_size {global_batch} is not a multiple of micro batch "
            f"{micro_batch} x {world.size} processes"
        )
    augmentation = _Augmentation(recipe, prepared.manifest)
    if augmentation.mixes and micro_batch % 2:
        raise UserError(
            "data.mixup_alpha and cutmix_alpha mix neighbours, so micro batches must be even, but "
            f"{global_batch} images on {world.size} processes are micro batches of {micro_batch}: "
            "choose training.micro_batch_size or the number of processes"
        )
    path = prepared.readable("train")
    shuffled = _shuffle(recipe, path, samples)

    def order(epoch: int) -> np.ndarray:
        batches = shuffled(epoch)[:whole].reshape(-1, world.size, micro_batch)
        return batches[:, world.rank].reshape(-1)

    visit = Visit(
        order=order,
        size=augmentation.size,
        boxes=augmentation.boxes,
        moves=augmentation.moves,
        transform=augmentation.transform,
    )
    return EpochLoader(path, prepared.manifest, "train", micro_batch, data.workers, visit)


def eval_loader(
    recipe: Recipe, prepared: PreparedData, world: World, batch_size: int, split: str = "val"
) -> EpochLoader:
    """Make the loader that shows every image of ``split`` exactly once over all processes.

    Images are unchanged and in order: rank r has the samples r, r + size, ... Processes may have
    unequal numbers of batches, so the loop over them must not contain a collective.

    Raises:
        UserError: a copy on the node cannot be made.
    """
    manifest, samples = prepared.manifest, prepared.split(split).samples

    def boxes(
        heights: np.ndarray, widths: np.ndarray, epoch: int, chosen: np.ndarray
    ) -> np.ndarray:
        if manifest.fixed_size:
            return sampling.whole_boxes(heights, widths)
        return sampling.centre_boxes(heights, widths)

    visit = Visit(
        order=lambda epoch: np.arange(world.rank, samples, world.size),
        size=lambda epoch: recipe.data.evaluated_size,
        boxes=boxes,
    )
    path = prepared.readable(split)
    return EpochLoader(path, manifest, split, batch_size, recipe.data.workers, visit)


def _shuffle(recipe: Recipe, path: Path, samples: int) -> Callable[[int], np.ndarray]:
    """Return the function epoch -> (samples,) that orders all images."""
    window, global_batch = recipe.data.shuffle_pages, recipe.training.global_batch_size
    if window is None:
        return lambda epoch: sampling.permutation(recipe.seed, epoch, samples)
    pages = StoredImages(path).pages
    held = samples * window // len(np.unique(pages))
    if held < global_batch:
        raise UserError(
            f"data.shuffle_pages is {window}: so many pages of {path} hold some {held} images, "
            f"fewer than training.global_batch_size {global_batch}, so that the same images would "
            "share a batch in every epoch; set it higher"
        )
    return lambda epoch: sampling.page_permutation(recipe.seed, epoch, pages, window)


@dataclass(frozen=True)
class _Augmentation:
    """A recipe's changes of training images, as the methods that a ``Visit`` needs."""

    recipe: Recipe
    manifest: Manifest

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.recipe.data.mixup_alpha > 0 or self.recipe.data.cutmix_alpha > 0

    def size(self, epoch: int) -> int:
        """Return the side of the images in pixels, which may grow from epoch to epoch."""
        return training_size(self.recipe.data, epoch, self.recipe.training.epochs)

    def boxes(
        self, heights: np.ndarray, widths: np.ndarray, epoch: int, samples: np.ndarray
    ) -> np.ndarray:
        """Return the boxes of random resized crops, or whole images if they are of fixed size."""
        if self.manifest.fixed_size:
            return sampling.whole_boxes(heights, widths)
        return sampling.random_boxes(heights, widths, self.recipe.seed, epoch, samples)

    def moves(self, size: int, epoch: int, samples: np.ndarray) -> np.ndarray:
        """Return mirroring and shifts; shifts are smaller while images are smaller."""
        data = self.recipe.data
        padding = data.crop_padding * size // data.image_size
        return sampling.moves(self.recipe.seed, epoch, samples, data.flip, padding)

    def transform(self, batch: Batch, epoch: int) -> Batch:
        """Augment decoded images."""
        data = self.recipe.data
        images, targets = batch.images, None
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
