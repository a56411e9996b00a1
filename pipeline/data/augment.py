"""What is done to decoded training images: colour jitter, RandAugment, random erasing, mixup and
cutmix.

Sources: RandAugment, arXiv 1909.13719; random erasing, arXiv 1708.04896; mixup, arXiv 1710.09412;
    cutmix, arXiv 1905.04899; all with
the constants of torchvision's classes of these names. ``draw(stream)`` gives one number in [0, 1)
for each image, so that what happens to it depends on nothing else: not on the other images of the
batch (but its partner), nor on their number or torch's threads.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pipeline.data.sampling import fitting_boxes

# stream -> (B,) numbers in [0, 1)
Draw = Callable[[int], np.ndarray]

# first of the streams that a function below draws from
JITTER, RANDAUGMENT, ERASE, MIX = 64, 96, 128, 192
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 3.3)


def color_jitter(images: Tensor, strength: float, draw: Draw) -> Tensor:
    """``images`` (B, 3, S, S) uint8 with brightness, contrast and saturation each scaled by 1 -
    strength .. 1 + strength.

    Each image has its own order of the three. torchvision has the same steps, for one factor at a
    time.
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
    return F.rgb_to_grayscale(images)


def _mean_grey(images: Tensor) -> Tensor:
    # an exact sum, in whatever order it is done
    return _grey(images).double().mean((1, 2, 3), keepdim=True).float()


def _rows(mask: np.ndarray) -> Tensor | None:
    return torch.from_numpy(np.flatnonzero(mask)) if mask.any() else None


def rand_augment(images: Tensor, operations: int, magnitude: int, draw: Draw) -> Tensor:
    """``operations`` random steps of torchvision's RandAugment on ``images`` (B, 3, S, S) uint8, at
    ``magnitude`` 0 .. 30.
    """
    library = v2.RandAugment(operations, magnitude)
    for turn in range(operations):
        which = np.floor(draw(RANDAUGMENT + 2 * turn) * len(library._AUGMENTATION_SPACE))
        negative = draw(RANDAUGMENT + 2 * turn + 1) < 0.5
        for number, (name, (magnitudes, signed)) in enumerate(library._AUGMENTATION_SPACE.items()):
            scale = magnitudes(library.num_magnitude_bins, *images.shape[2:])
            value = 0.0 if scale is None else float(scale[magnitude])
            for sign in (1, -1) if signed else (1,):
                if (
                    chosen := _rows((which == number) & ((not signed) | (negative == (sign < 0))))
                ) is not None:
                    # Never one alone: torch would split the sum over its pixels among its threads,
                    # whose number would show.
                    part = images[chosen if len(chosen) > 1 else chosen.expand(2)]
                    done = library._apply_image_or_video_transform(
                        part, name, sign * value, library.interpolation, library._fill
                    )
                    images[chosen] = done[: len(chosen)]
    return images


def random_erasing(images: Tensor, probability: float, draw: Draw) -> Tensor:
    """``images`` (B, 3, S, S) with a rectangle of random area, aspect ratio and place set to 0 in a
    share ``probability`` of them.
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
    """Mix images 2k and 2k + 1 of a batch with each other, by mixup or by cutmix (evenly often,
    where both are on).

    Neighbours in the order of an epoch, of which every micro batch has an even number, are
    partners, whatever the number of processes. Both get the same share of their own: Beta(a, a)
    distributed, with a = ``mixup`` or ``cutmix``; 0 turns one off.

    Args:
        images: (B, 3, S, S) uint8, B even. labels: (B,) int64.

    Returns:
        images, and targets (B, C) float32 that say which part of an image is of which class.
    """
    size = images.shape[2]
    by_cutmix = draw(MIX)[::2] < (0.5 if mixup and cutmix else float(cutmix > 0))
    alpha = np.where(by_cutmix, cutmix, mixup)
    # (pairs,) share of the own image
    own = betaincinv(alpha, alpha, draw(MIX + 1)[::2])
    middle = [draw(MIX + 2 + axis)[::2] * size for axis in range(2)]
    half = np.sqrt(1 - own) * size / 2
    # (2, pairs)
    begin, end = (
        np.stack([np.clip(np.floor(m + sign * half), 0, size) for m in middle]).astype(int)
        for sign in (-1, 1)
    )
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
    """Rows 2k and 2k + 1 exchanged, as a copy."""
    return values[torch.arange(len(values)) ^ 1]
