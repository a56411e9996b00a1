"""FFCV's JPEG decoder and resizer in one compiled loop over the images of a batch.

FFCV's own decoders and transforms draw from numba's per-thread generators, which nothing can seed,
and each passes the whole batch through memory once more. Here a plan from outside says what to do
with each image, while it is in the processor's cache.

Import this module after ``load_ffcv``, which says where numba keeps what it compiles.
"""

import numpy as np
from numba import njit, prange, types

from pipeline.data.beton import IMAGE_MODES
from pipeline.data.stored_images import DOWN, FLIP, HEIGHT, LEFT, RIGHT, TOP, WIDTH

_JPG = IMAGE_MODES["jpg"]
_u32 = types.uint32
_imdecode = types.ExternalFunction(
    "coda_ffcv_imdecode",
    types.int32(
        types.voidptr,
        types.uint64,
        _u32,
        _u32,
        types.voidptr,
        *[_u32] * 6,
        types.boolean,
        types.boolean,
    ),
)
_resize = types.ExternalFunction("coda_ffcv_resize", types.void(*[types.int64] * 11))


@njit(cache=True, parallel=True, nogil=True, error_model="numpy")
def decode(samples, fields, data, starts, sizes, plan, images):
    side = images.shape[1]
    for slot in prange(len(samples)):
        field = fields[samples[slot]]
        height, width = np.int64(field["height"]), np.int64(field["width"])
        start = field["data_ptr"]
        stored = data[start : start + sizes[np.searchsorted(starts, start)]]
        if field["mode"] == _JPG:
            pixels = np.empty((height, width, 3), np.uint8)
            pointer = pixels.ctypes.data
            if (
                _imdecode(
                    stored.ctypes.data,
                    stored.size,
                    height,
                    width,
                    pointer,
                    height,
                    width,
                    0,
                    0,
                    1,
                    1,
                    False,
                    False,
                )
                != 0
            ):
                plan[slot, HEIGHT] = 0
        else:
            pixels = stored.reshape((height, width, 3))
        if plan[slot, HEIGHT] > 0:
            top, left = np.int64(plan[slot, TOP]), np.int64(plan[slot, LEFT])
            bottom, right = top + plan[slot, HEIGHT], left + plan[slot, WIDTH]
            flip, image = plan[slot, FLIP] != 0, images[slot]
            if bottom - top == side and right - left == side:
                _place(
                    pixels[top:bottom, left:right], image, flip, plan[slot, DOWN], plan[slot, RIGHT]
                )
            elif plan[slot, DOWN] == 0 and plan[slot, RIGHT] == 0:
                _resize(
                    0,
                    pixels.ctypes.data,
                    height,
                    width,
                    top,
                    bottom,
                    left,
                    right,
                    image.ctypes.data,
                    side,
                    side,
                )
                if flip:
                    _mirror(image)
            else:
                scaled = np.empty((side, side, 3), np.uint8)
                _resize(
                    0,
                    pixels.ctypes.data,
                    height,
                    width,
                    top,
                    bottom,
                    left,
                    right,
                    scaled.ctypes.data,
                    side,
                    side,
                )
                _place(scaled, image, flip, plan[slot, DOWN], plan[slot, RIGHT])


@njit(nogil=True)
def _mirror(image):
    side = image.shape[1]
    for row in range(side):
        for column in range(side // 2):
            for channel in range(3):
                other = image[row, side - 1 - column, channel]
                image[row, side - 1 - column, channel] = image[row, column, channel]
                image[row, column, channel] = other


@njit(nogil=True)
def _place(source, target, flip, down, right):
    """target[row, column] = source[row + down, column + right], of the mirrored source if ``flip``,
    and 0 outside of it.
    """
    side = target.shape[0]
    first, last = max(0, -right), min(side, side - right)
    for row in range(side):
        if 0 <= row + down < side:
            target[row, :first] = 0
            target[row, last:] = 0
            if flip:
                for column in range(first, last):
                    for channel in range(3):
                        target[row, column, channel] = source[
                            row + down, side - 1 - column - right, channel
                        ]
            else:
                for column in range(first, last):
                    for channel in range(3):
                        target[row, column, channel] = source[row + down, column + right, channel]
        else:
            target[row] = 0
