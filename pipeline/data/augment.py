"""Augmentations of decoded training images: colour jitter, RandAugment, erasing, mixup and cutmix.

Sources: RandAugment, arXiv 1909.13719; random erasing, arXiv 1708.04896; mixup, arXiv 1710.09412;
cutmix, arXiv 1905.04899; all with the constants of torchvision's classes of these names.

``draw(stream)`` gives one number in [0, 1) for each image. What happens to an image depends on
these numbers alone: not on the other images of the batch (except its partner in ``mix``), nor on
their number or on torch's threads.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import rgb_to_grayscale

from pipeline.data.sampling import fitting_boxes

Draw = Callable[[int], np.ndarray]
"""stream -> (B,) numbers in [0, 1)."""

# The first of the streams that each function below draws from.
JITTER = 64
RANDAUGMENT = 96
ERASE = 128
MIX = 192

ERASED_AREA = (0.02, 1 / 3)
"""Bounds of the share of an image that is erased."""
ERASED_ASPECT = (0.3, 3.3)
"""Bounds of width / height of an erased rectangle."""


def color_jitter(images: Tensor, strength: float, draw: Draw) -> Tensor:
    """Scale brightness, contrast and saturation by factors in 1 - strength .. 1 + strength.

    The three come in an order of its own for each image. torchvision has the same steps, with one
    factor and one order for all images of a call.

    Args:
        images: (B, 3, S, S) uint8; changed in place.
        strength: largest difference of a factor from 1.
        draw: random numbers of the images.

    Returns:
        ``images``.
    """
    factors = [1 + strength * (2 * draw(JITTER + step) - 1) for step in range(3)]
    orders = np.argsort([draw(JITTER + 3 + step) for step in range(3)], axis=0)  # (3, B)
    for turn in range(3):
        for step, other in enumerate((_black, _mean_grey, _grey)):
            if (chosen := _rows(orders[turn] == step)) is not None:
                part = images[chosen]
                factor = torch.from_numpy(factors[step]).float()[chosen].view(-1, 1, 1, 1)
                images[chosen] = (
                    (part * factor + other(part) * (1 - factor)).clamp_(0, 255).to(torch.uint8)
                )
    return images


def _black(images: Tensor) -> Tensor:
    return torch.zeros(1)


def _grey(images: Tensor) -> Tensor:
    grey: Tensor = rgb_to_grayscale(images)
    return grey


def _mean_grey(images: Tensor) -> Tensor:
    # In double precision the sum is exact, so its order does not matter.
    return _grey(images).double().mean((1, 2, 3), keepdim=True).float()


def _rows(mask: np.ndarray) -> Tensor | None:
    """Return the indices at which ``mask`` (B,) is true, or None if there are none."""
    return torch.from_numpy(np.flatnonzero(mask)) if mask.any() else None


def rand_augment(images: Tensor, operations: int, magnitude: int, draw: Draw) -> Tensor:
    """Apply random operations of torchvision's RandAugment.

    Args:
        images: (B, 3, S, S) uint8; changed in place.
        operations: operations per image, one after the other.
        magnitude: strength of each, 0 .. 30.
        draw: random numbers of the images.

    Returns:
        ``images``.
    """
    library = v2.RandAugment(operations, magnitude)
    space = library._AUGMENTATION_SPACE
    for turn in range(operations):
        which = np.floor(draw(RANDAUGMENT + 2 * turn) * len(space))
        negative = draw(RANDAUGMENT + 2 * turn + 1) < 0.5
        for number, (name, (magnitudes, signed)) in enumerate(space.items()):
            scale = magnitudes(library.num_magnitude_bins, *images.shape[2:])
            value = 0.0 if scale is None else float(scale[magnitude])
            mask = which == number
            if signed:
                _operate(library, name, value, images, mask & ~negative)
                _operate(library, name, -value, images, mask & negative)
            else:
                _operate(library, name, value, images, mask)
    return images


def _operate(
    library: v2.RandAugment, name: str, value: float, images: Tensor, mask: np.ndarray
) -> None:
    """Apply one operation to the images (B, 3, S, S) at which ``mask`` (B,) is true, in place."""
    chosen = _rows(mask)
    if chosen is None:
        return
    # Never one image alone: torch would split the sum over its pixels among its threads, and the
    # result would depend on their number.
    part = images[chosen if len(chosen) > 1 else chosen.expand(2)]
    changed = library._apply_image_or_video_transform(
        part, name, value, library.interpolation, library._fill
    )
    images[chosen] = changed[: len(chosen)]


def random_erasing(images: Tensor, probability: float, draw: Draw) -> Tensor:
    """Set a rectangle of random area, aspect ratio and place to 0 in some of the images.

    Args:
        images: (B, 3, S, S); changed in place.
        probability: share of the images in which a rectangle is erased.
        draw: random numbers of the images.

    Returns:
        ``images``.
    """
    side = np.full(len(images), images.shape[2])
    boxes, found = fitting_boxes(
        side, side, ERASED_AREA, ERASED_ASPECT, lambda stream, left: draw(ERASE + 1 + stream)[left]
    )
    for number in np.flatnonzero(found & (draw(ERASE) < probability)):
        top, left, height, width = boxes[number]
        images[number, :, top : top + height, left : left + width] = 0
    return images


def mix(
    images: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float, draw: Draw
) -> tuple[Tensor, Tensor]:
    """Mix images 2k and 2k + 1 of a batch with each other, by mixup or by cutmix.

    Where both are on, each is done half of the time. Partners are neighbours in the order of an
    epoch, whatever the number of processes, as every micro batch has an even number of images.
    Both partners keep the same share of their own image, which is Beta(a, a) distributed, with
    a = ``mixup`` or ``cutmix``.

    Args:
        images: (B, 3, S, S) uint8, B even; changed in place.
        labels: (B,) int64.
        classes: number of classes C.
        mixup: alpha of mixup; 0 turns it off.
        cutmix: alpha of cutmix; 0 turns it off.
        draw: random numbers of the images; those of the first of two partners are used.

    Returns:
        ``images``, and targets (B, C) float32: the share of each class in each image.
    """
    size = images.shape[2]
    by_cutmix = draw(MIX)[::2] < (0.5 if mixup and cutmix else float(cutmix > 0))
    alpha = np.where(by_cutmix, cutmix, mixup)
    # The share that an image keeps of itself.
    own = betaincinv(alpha, alpha, draw(MIX + 1)[::2])  # (B/2,)
    middle = np.stack([draw(MIX + 2 + axis)[::2] * size for axis in range(2)])  # (2, B/2)
    half = np.sqrt(1 - own) * size / 2
    begin = np.clip(np.floor(middle - half), 0, size).astype(int)  # (2, B/2)
    end = np.clip(np.floor(middle + half), 0, size).astype(int)
    own = np.where(by_cutmix, 1 - (end - begin).prod(0) / size**2, own)
    partners = _swap(images)
    for pair in np.flatnonzero(by_cutmix):
        (top, left), (bottom, right) = begin[:, pair], end[:, pair]
        both = slice(2 * pair, 2 * pair + 2)
        images[both, :, top:bottom, left:right] = partners[both, :, top:bottom, left:right]
    shares = torch.from_numpy(own.repeat(2)).float()
    if (blended := _rows(~by_cutmix.repeat(2))) is not None:
        share = shares[blended].view(-1, 1, 1, 1)
        images[blended] = (
            (images[blended] * share + partners[blended] * (1 - share)).round_().to(torch.uint8)
        )
    one_hot = torch.nn.functional.one_hot(labels, classes).float()
    return images, shares[:, None] * one_hot + (1 - shares[:, None]) * _swap(one_hot)


def _swap(values: Tensor) -> Tensor:
    """Return a copy with rows 2k and 2k + 1 exchanged."""
    return values[torch.arange(len(values)) ^ 1]
