"""Order and augmentation as pure functions of (seed, epoch, sample index), so that threads, ranks and restarts change nothing.

Random numbers come from the SplitMix64 finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014) as a hash; random resized crops follow Szegedy et al. (arXiv 1409.4842, section 6) as torchvision draws them.
A box is (top, left, height, width) in pixels of the stored image.
"""

import numpy as np

CROP_AREA = (0.08, 1.0)  # share of the stored image's area
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height
CROP_ATTEMPTS = 10
CENTRE_SHARE = 224 / 256  # side of the evaluation crop / shorter side of the stored image

FLIP, SHIFT_DOWN, SHIFT_RIGHT, CROP = range(4)  # streams of independent random numbers; CROP and the following for the crops


def uniform(seed: int, epoch: int, indices: np.ndarray, stream: int) -> np.ndarray:
    """(N,) numbers in [0, 1), one for each sample index."""
    state = np.zeros(len(indices), np.uint64)
    for word in (seed, epoch, stream, indices):
        state = _mix(state ^ np.asarray(word, np.uint64))
    return (state >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    """(samples,) int64: the order in which one epoch visits the samples, the same on every process."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


def moves(seed: int, epoch: int, indices: np.ndarray, flip: bool, padding: int) -> np.ndarray:
    """(N, 3): whether to mirror (half of the images, if ``flip``), then by how much to move up and left: -padding .. padding pixels."""
    mirrored = uniform(seed, epoch, indices, FLIP) < 0.5 if flip else np.zeros(len(indices), bool)
    shifts = [uniform(seed, epoch, indices, stream) * (2 * padding + 1) for stream in (SHIFT_DOWN, SHIFT_RIGHT)]
    return np.stack([mirrored, *(np.floor(shift) - padding for shift in shifts)], axis=1)


def whole_boxes(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(N, 4) boxes that hold the whole images."""
    return np.stack([np.zeros_like(heights), np.zeros_like(widths), heights, widths], axis=1)


def centre_boxes(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(N, 4) central squares with CENTRE_SHARE of the shorter side."""
    side = np.maximum(np.round(np.minimum(heights, widths) * CENTRE_SHARE).astype(np.int64), 1)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


def random_boxes(heights: np.ndarray, widths: np.ndarray, seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """(N, 4) boxes of random area, aspect ratio and place; the largest central one of valid aspect if no attempt fits."""
    low, high = CROP_ASPECT
    box_widths = np.minimum(widths, np.maximum(np.round(heights * high), 1)).astype(np.int64)
    box_heights = np.minimum(heights, np.maximum(np.round(widths / low), 1)).astype(np.int64)
    boxes = np.stack([(heights - box_heights) // 2, (widths - box_widths) // 2, box_heights, box_widths], axis=1)
    left = np.arange(len(indices))  # positions without a box so far
    for attempt in range(CROP_ATTEMPTS):
        height, width = heights[left], widths[left]
        area, aspect, down, right = (uniform(seed, epoch, indices[left], CROP + 4 * attempt + draw) for draw in range(4))
        area = height * width * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
        aspect = low * (high / low) ** aspect
        h, w = np.round(np.sqrt(area / aspect)).astype(np.int64), np.round(np.sqrt(area * aspect)).astype(np.int64)
        top, start = np.floor(down * (height - h + 1)).astype(np.int64), np.floor(right * (width - w + 1)).astype(np.int64)
        fits = (0 < h) & (h <= height) & (0 < w) & (w <= width)
        boxes[left[fits]] = np.stack([top, start, h, w], axis=1)[fits]
        left = left[~fits]
        if not len(left):
            break
    return boxes
