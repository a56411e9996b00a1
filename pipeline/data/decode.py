"""Reading .beton files: FFCV's format, JPEG decoder and resizer in one compiled loop over the
images of a batch.

FFCV's own decoders and transforms draw from numba's per-thread generators, which nothing can seed,
and each passes the whole batch through memory once more. Here a plan from outside says what to do
with each image, while it is in the processor's cache.
"""

import ctypes
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.libffcv import lib
from ffcv.reader import Reader
from numba import njit, prange, types

# columns of a plan
TOP, LEFT, HEIGHT, WIDTH, FLIP, DOWN, RIGHT = range(7)
PLAN_COLUMNS = 7
_JPG = IMAGE_MODES["jpg"]


def _external(name: str, signature) -> types.ExternalFunction:
    """libffcv's function ``name`` for compiled code, which finds it by name: with an address in it,
    numba would not cache the code.
    """
    symbol = f"coda_ffcv_{name}"
    llvm.add_symbol(symbol, ctypes.cast(getattr(lib, name), ctypes.c_void_p).value)
    return types.ExternalFunction(symbol, signature)


_u32 = types.uint32
_imdecode = _external(
    "imdecode",
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
_resize = _external("resize", types.void(*[types.int64] * 11))


class StoredImages:
    """A .beton file of images and labels, its pixels mapped into memory. It must have been checked
    (``manifest.open_manifest``).

    Attributes:
        heights, widths: (N,) int64, of the images as they are stored.
        labels: (N,) int64.
        pages: (N,) int64: in which of the file's pages, pieces of some megabytes, an image lies.
    """

    def __init__(self, path: Path):
        reader = Reader(str(path))
        self._fields = reader.metadata["f0"]
        # mapped copy-on-write, and never written to
        self._bytes = np.memmap(path, np.uint8, mode="c").view(np.ndarray)
        order = np.argsort(reader.alloc_table["ptr"])
        self._starts, self._sizes = (
            np.ascontiguousarray(reader.alloc_table[name][order]) for name in ("ptr", "size")
        )
        self.heights, self.widths = (
            self._fields[name].astype(np.int64) for name in ("height", "width")
        )
        self.labels = reader.metadata["f1"].astype(np.int64).reshape(-1)
        self.pages = (self._fields["data_ptr"] // np.uint64(reader.page_size)).astype(np.int64)

    def decode(self, samples: np.ndarray, plan: np.ndarray, images: np.ndarray) -> None:
        """Fill ``images`` (B, S, S, 3) uint8 with the ``samples`` (B,), using as many threads as
        numba has been told to.

        Row b of ``plan`` (B, 7) int32 is (top, left, height, width) of the part of image b that is
        resized to S x S (pixels are unchanged where that is its size already), whether to mirror it
        then, and by how many pixels to move it up and left after that, zeros moving in. The height
        becomes 0 where a stored JPEG cannot be decoded.
        """
        _decode(samples, self._fields, self._bytes, self._starts, self._sizes, plan, images)


@njit(cache=True, parallel=True, nogil=True, error_model="numpy")
def _decode(samples, fields, data, starts, sizes, plan, images):
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
