"""FFCV's JPEG decoder and resizer in one compiled loop over the images of a batch.

FFCV's own decoders and transforms draw from numba's per-thread generators, which cannot be seeded,
and each of them passes the whole batch through memory once more. Here a plan says what to do with
each image while it is in the processor's cache.

Import this module after ``load_ffcv``, which sets where numba keeps what it compiles.
"""

from typing import Any

import numpy as np
from numba import njit, prange, types

from pipeline.data.beton import IMAGE_MODES
from pipeline.data.view_plan import DOWN, FLIP, HEIGHT, LEFT, RIGHT, TOP, WIDTH

_JPG = IMAGE_MODES["jpg"]

# Functions of FFCV's library. Typed as Any, because numba's stubs take a signature for a type.
_u32 = types.uint32
# (JPEG, its bytes, height, width, pixels, output height, output width, crop top, crop left,
# numerator and denominator of a scale, whether to crop, whether to flip) -> error
_imdecode_signature: Any = types.int32(
    *[types.voidptr, types.uint64, _u32, _u32, types.voidptr],
    *[_u32] * 6,
    *[types.boolean, types.boolean],
)
_imdecode: Any = types.ExternalFunction("coda_ffcv_imdecode", _imdecode_signature)
# (mode, pixels, height, width, top, bottom, left, right, result, its height, its width)
_resize: Any = types.ExternalFunction("coda_ffcv_resize", types.void(*[types.int64] * 11))


@njit(cache=True, parallel=True, nogil=True, error_model="numpy")
def decode(
    samples: np.ndarray,
    fields: np.ndarray,
    data: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    plan: np.ndarray,
    images: np.ndarray,
) -> None:
    """Decode, crop, resize, mirror and move a batch of images.

    Args:
        samples: (B,) indices into ``fields``.
        fields: (N,) beton.IMAGE.
        data: (bytes,) uint8, the whole .beton file.
        starts: (N,) addresses of the images, sorted.
        sizes: (N,) bytes of the images at ``starts``.
        plan: (B, 7) int32, as ``StoredImages.decode`` describes it.
        images: (B, S, S, 3) uint8, the result.
    """
    side = images.shape[1]
    for slot in prange(len(samples)):
        field = fields[samples[slot]]
        height, width = np.int64(field["height"]), np.int64(field["width"])
        start = field["data_ptr"]
        stored = data[start : start + sizes[np.searchsorted(starts, start)]]
        if field["mode"] == _JPG:
            pixels = np.empty((height, width, 3), np.uint8)
            if not _read_jpeg(stored, pixels):
                plan[slot, HEIGHT] = 0
        else:
            pixels = stored.reshape((height, width, 3))
        if plan[slot, HEIGHT] > 0:
            top, left = np.int64(plan[slot, TOP]), np.int64(plan[slot, LEFT])
            bottom, right = top + plan[slot, HEIGHT], left + plan[slot, WIDTH]
            flip, image = plan[slot, FLIP] != 0, images[slot]
            moved = plan[slot, DOWN] != 0 or plan[slot, RIGHT] != 0
            if bottom - top == side and right - left == side:
                part = pixels[top:bottom, left:right]
                _place(part, image, flip, plan[slot, DOWN], plan[slot, RIGHT])
            elif moved:
                scaled = np.empty((side, side, 3), np.uint8)
                _scale(pixels, top, bottom, left, right, scaled)
                _place(scaled, image, flip, plan[slot, DOWN], plan[slot, RIGHT])
            else:
                _scale(pixels, top, bottom, left, right, image)
                if flip:
                    _mirror(image)


@njit(nogil=True)
def _read_jpeg(stored: np.ndarray, pixels: np.ndarray) -> bool:
    """Decode the JPEG ``stored`` into ``pixels`` (H, W, 3); return whether that succeeded."""
    height, width = pixels.shape[:2]
    source, target = stored.ctypes.data, pixels.ctypes.data
    error: int = _imdecode(
        source, stored.size, height, width, target, height, width, 0, 0, 1, 1, False, False
    )
    return error == 0


@njit(nogil=True)
def _scale(
    pixels: np.ndarray,
    top: np.int64,
    bottom: np.int64,
    left: np.int64,
    right: np.int64,
    target: np.ndarray,
) -> None:
    """Resize rows top .. bottom and columns left .. right of ``pixels`` into ``target``."""
    height, width = pixels.shape[:2]
    side = target.shape[0]
    source, result = pixels.ctypes.data, target.ctypes.data
    _resize(0, source, height, width, top, bottom, left, right, result, side, side)


@njit(nogil=True)
def _mirror(image: np.ndarray) -> None:
    """Exchange left and right of an image (S, S, 3) in place."""
    side = image.shape[1]
    for row in range(side):
        for column in range(side // 2):
            for channel in range(3):
                other = image[row, side - 1 - column, channel]
                image[row, side - 1 - column, channel] = image[row, column, channel]
                image[row, column, channel] = other


@njit(nogil=True)
def _place(source: np.ndarray, target: np.ndarray, flip: bool, down: int, right: int) -> None:
    """Copy ``source`` (S, S, 3), moved up and left, to ``target``; what moves in is 0.

    target[row, column] = source[row + down, column + right], of the mirrored source if ``flip``.
    """
    side = target.shape[0]
    first, last = max(0, -right), min(side, side - right)
    for row in range(side):
        if 0 <= row + down < side:
            target[row, :first] = 0
            target[row, last:] = 0
            for column in range(first, last):
                from_column = column + right
                if flip:
                    from_column = side - 1 - from_column
                for channel in range(3):
                    target[row, column, channel] = source[row + down, from_column, channel]
        else:
            target[row] = 0
