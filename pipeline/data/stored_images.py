"""The images of a .beton file, mapped into memory and decoded by FFCV's library."""

from pathlib import Path

import numpy as np

from pipeline.data.beton import read_tables
from pipeline.data.ffcv_library import load_ffcv

# Columns of a plan.
TOP, LEFT, HEIGHT, WIDTH, FLIP, DOWN, RIGHT = range(7)
PLAN_COLUMNS = 7


class StoredImages:
    """A .beton file of images and labels, its pixels mapped into memory. It must have been checked
    (``manifest.open_manifest``).

    Attributes:
        heights, widths: (N,) int64, of the images as they are stored.
        labels: (N,) int64.
        pages: (N,) int64: in which of the file's pages, pieces of some megabytes, an image lies.
    """

    def __init__(self, path: Path):
        load_ffcv()
        tables = read_tables(path)
        self._fields = tables.samples["f0"]
        # mapped copy-on-write, and never written to
        self._bytes = np.memmap(path, np.uint8, mode="c").view(np.ndarray)
        addresses = tables.addresses[np.argsort(tables.addresses["ptr"])]
        self._starts, self._sizes = (
            np.ascontiguousarray(addresses[name]) for name in ("ptr", "size")
        )
        self.heights, self.widths = (
            self._fields[name].astype(np.int64) for name in ("height", "width")
        )
        self.labels = tables.samples["f1"].astype(np.int64)
        self.pages = (self._fields["data_ptr"] // np.uint64(tables.page_size)).astype(np.int64)

    def decode(self, samples: np.ndarray, plan: np.ndarray, images: np.ndarray) -> None:
        """Fill ``images`` (B, S, S, 3) uint8 with the ``samples`` (B,), using as many threads as
        numba has been told to.

        Row b of ``plan`` (B, 7) int32 is (top, left, height, width) of the part of image b that is
        resized to S x S (pixels are unchanged where that is its size already), whether to mirror it
        then, and by how many pixels to move it up and left after that, zeros moving in. The height
        becomes 0 where a stored JPEG cannot be decoded.
        """
        from pipeline.data.decode import decode

        decode(samples, self._fields, self._bytes, self._starts, self._sizes, plan, images)
