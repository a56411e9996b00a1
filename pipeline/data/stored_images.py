"""The images of a .beton file, mapped into memory and decoded by FFCV's library."""

from pathlib import Path

import numpy as np

from pipeline.data.beton import read_tables
from pipeline.data.ffcv_library import load_ffcv


class StoredImages:
    """A .beton file of images and labels, mapped into memory.

    Args:
        path: the file, which ``manifest.open_manifest`` has checked.

    Attributes:
        heights: (N,) int64, heights of the images as they are stored.
        widths: (N,) int64, widths of the images as they are stored.
        labels: (N,) int64.
        pages: (N,) int64, the page of the file, a piece of some megabytes, in which an image lies.
    """

    def __init__(self, path: Path):
        load_ffcv()
        tables = read_tables(path)
        self._fields = tables.samples["f0"]
        # Mapped copy-on-write, and never written to.
        self._bytes = np.memmap(path, np.uint8, mode="c").view(np.ndarray)
        addresses = tables.addresses[np.argsort(tables.addresses["ptr"])]
        self._starts = np.ascontiguousarray(addresses["ptr"])
        self._sizes = np.ascontiguousarray(addresses["size"])
        self.heights = self._fields["height"].astype(np.int64)
        self.widths = self._fields["width"].astype(np.int64)
        self.labels = tables.samples["f1"].astype(np.int64)
        self.pages = (self._fields["data_ptr"] // np.uint64(tables.page_size)).astype(np.int64)

    def decode(self, samples: np.ndarray, plan: np.ndarray, images: np.ndarray) -> None:
        """Decode samples into ``images``, with as many threads as numba is set to.

        Args:
            samples: (B,) indices of the samples.
            plan: (B, 7) int32. Row b is the box (top, left, height, width) of image b that is
                resized to S x S, or copied if that is its size; whether to mirror it then; and by
                how many pixels to move it up and left after that, where zeros move in. The height
                is set to 0 where a stored JPEG cannot be decoded.
            images: (B, S, S, 3) uint8, the result.
        """
        from pipeline.data.decode import decode

        decode(samples, self._fields, self._bytes, self._starts, self._sizes, plan, images)
