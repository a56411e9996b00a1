"""Order and augmentation as pure functions.

The order depends on seed, epoch and number of samples, augmentation on seed, epoch and sample.
Threads, ranks and restarts therefore change nothing. A box is (top, left, height, width) in pixels
of the stored image.

Sources: random numbers come from the SplitMix64 finaliser as a hash (Steele, Lea, Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014). Random resized crops follow Szegedy et al.
(arXiv 1409.4842, section 6) as torchvision draws them.
"""

from collections.abc import Callable

import numpy as np

from pipeline.data.images import CENTRE_SHARE

CROP_AREA = (0.08, 1.0)
"""Bounds of a crop's share of the stored image's area."""
CROP_ASPECT = (3 / 4, 4 / 3)
"""Bounds of a crop's width / height."""
ATTEMPTS = 10
"""Attempts to find a random box that fits."""

# Streams of independent random numbers. Crops use CROP and those after it.
FLIP = 0
SHIFT_DOWN = 1
SHIFT_RIGHT = 2
CROP = 3


def uniform(seed: int, epoch: int, indices: np.ndarray, stream: int) -> np.ndarray:
    """Return (N,) numbers in [0, 1), one for each sample index."""
    state = np.zeros(len(indices), np.uint64)
    for word in (seed, epoch, stream, indices):
        state = _mix(state ^ np.asarray(word, np.uint64))
    return (state >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the next state of SplitMix64, finalised, for each state in ``x``."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    """Return (samples,) int64: the order of an epoch's samples, the same on every process."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


def page_permutation(seed: int, epoch: int, pages: np.ndarray, window: int) -> np.ndarray:
    """Return an epoch's order that reads ``window`` pages of the file at a time.

    Pages come in random order, and the samples of a window of them are shuffled, so that only one
    window need be in memory.

    Args:
        seed: seed of the run.
        epoch: number of the epoch.
        pages: (samples,) page in which each sample lies.
        window: pages that are read together.

    Returns:
        (samples,) int64, the samples in their order.
    """
    generator = np.random.default_rng([seed, epoch])
    numbers, page = np.unique(pages, return_inverse=True)
    windows = generator.permutation(len(numbers))[page] // window  # (samples,)
    return np.lexsort((generator.random(len(pages)), windows))


def moves(seed: int, epoch: int, indices: np.ndarray, flip: bool, padding: int) -> np.ndarray:
    """Draw mirroring and shifts.

    Returns:
        (N, 3): whether to mirror, true for half of the images if ``flip``; then by how many pixels
        to move up and left, in -padding .. padding.
    """
    mirrored = uniform(seed, epoch, indices, FLIP) < 0.5 if flip else np.zeros(len(indices), bool)
    shifts = [
        uniform(seed, epoch, indices, stream) * (2 * padding + 1)
        for stream in (SHIFT_DOWN, SHIFT_RIGHT)
    ]
    return np.stack([mirrored, *(np.floor(shift) - padding for shift in shifts)], axis=1)


def whole_boxes(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return (N, 4) boxes that hold the whole images."""
    return np.stack([np.zeros_like(heights), np.zeros_like(widths), heights, widths], axis=1)


def centre_boxes(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return (N, 4) central squares with CENTRE_SHARE of the shorter side."""
    side = np.maximum(np.round(np.minimum(heights, widths) * CENTRE_SHARE).astype(np.int64), 1)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


def random_boxes(
    heights: np.ndarray, widths: np.ndarray, seed: int, epoch: int, indices: np.ndarray
) -> np.ndarray:
    """Return (N, 4) boxes of random area, aspect ratio and place.

    Where no attempt fits, the box is the largest central one with a valid aspect ratio.
    """
    low, high = CROP_ASPECT
    boxes, found = fitting_boxes(
        heights,
        widths,
        CROP_AREA,
        CROP_ASPECT,
        lambda stream, left: uniform(seed, epoch, indices[left], CROP + stream),
    )
    box_widths = np.minimum(widths, np.maximum(np.round(heights * high), 1)).astype(np.int64)
    box_heights = np.minimum(heights, np.maximum(np.round(widths / low), 1)).astype(np.int64)
    central = np.stack(
        [(heights - box_heights) // 2, (widths - box_widths) // 2, box_heights, box_widths], axis=1
    )
    return np.where(found[:, None], boxes, central)


def fitting_boxes(
    heights: np.ndarray,
    widths: np.ndarray,
    areas: tuple[float, float],
    aspects: tuple[float, float],
    draw: Callable[[int, np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Draw boxes that lie inside their images.

    The share of the area is uniform in ``areas``, the logarithm of width / height is uniform in
    that of ``aspects``, and the place is uniform.

    Args:
        heights: (N,) heights of the images.
        widths: (N,) widths of the images.
        areas: bounds of the share of the area.
        aspects: bounds of width / height.
        draw: (stream, left) -> numbers in [0, 1) for the images ``left``; streams 0 to
            4 * ATTEMPTS - 1 are used.

    Returns:
        (N, 4) boxes, and (N,) whether one of the attempts fitted.
    """
    boxes = np.zeros((len(heights), 4), np.int64)
    found = np.zeros(len(heights), bool)
    low, high = aspects
    least, most = areas
    for attempt in range(ATTEMPTS):
        left = np.flatnonzero(~found)
        if not len(left):
            break
        height, width = heights[left], widths[left]
        area, aspect, down, right = (draw(4 * attempt + number, left) for number in range(4))
        area = height * width * (least + area * (most - least))
        aspect = low * (high / low) ** aspect
        h = np.round(np.sqrt(area / aspect)).astype(np.int64)
        w = np.round(np.sqrt(area * aspect)).astype(np.int64)
        top = np.floor(down * (height - h + 1)).astype(np.int64)
        start = np.floor(right * (width - w + 1)).astype(np.int64)
        fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
        boxes[left[fits]] = np.stack([top, start, h, w], axis=1)[fits]
        found[left] = fits
    return boxes, found
