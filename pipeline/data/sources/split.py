"""One split of a source: labels, and images that are read one by one.

Splits are shared with forked processes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.images import decode, read_file


@dataclass(frozen=True)
class Split:
    """Labels and images of one split."""

    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    labels: np.ndarray
    """(N,) int64."""
    fixed_size: bool
    """Whether images are stored as squares of data.image_size; otherwise the loader crops them."""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        """Read an image as the source has it, in RGB.

        Raises:
            BrokenImage: it cannot be decoded.
            OSError: its file cannot be read.
        """
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """Return the place of image ``index`` in the source, for messages."""
        raise NotImplementedError

    def identity(self) -> str:
        """Hash the classes, the labels and the places of the images.

        By this hash, an interrupted writer recognises its source.
        """
        digest = hashlib.sha256(
            "\0".join(self.classes).encode(errors="surrogateescape") + self.labels.tobytes()
        )
        for index in range(len(self)):
            digest.update(self.describe(index).encode(errors="surrogateescape") + b"\0")
        return digest.hexdigest()


@dataclass(frozen=True)
class ArraySplit(Split):
    """Images that are in memory."""

    images: np.ndarray
    """(N, H, W, 3) uint8."""
    name: str
    """Name of the split, for messages."""

    def read(self, index: int) -> Image.Image:
        """Return an image."""
        return Image.fromarray(self.images[index])

    def describe(self, index: int) -> str:
        """Return the image's index and the name of the split."""
        return f"image {index} of {self.name}"


@dataclass(frozen=True)
class FileSplit(Split):
    """Images that are files."""

    root: Path
    """Folder that ``names`` are relative to."""
    names: tuple[str, ...]
    """Paths of the files, relative to ``root`` or absolute."""

    def read(self, index: int) -> Image.Image:
        """Read and decode an image's file."""
        return decode(read_file(self.root / self.names[index]))

    def describe(self, index: int) -> str:
        """Return the path of an image's file."""
        return str(self.root / self.names[index])


@dataclass(frozen=True)
class TarSplit(Split):
    """Images that are members of uncompressed tar files, read in place."""

    tars: tuple[Path, ...]
    """The tar files."""
    names: tuple[str, ...]
    """Names of the members."""
    extents: np.ndarray
    """(N, 3) int64: index of the tar, offset and length of each member's bytes."""

    def read(self, index: int) -> Image.Image:
        """Read and decode a member."""
        tar, offset, length = self.extents[index]
        return decode(read_file(self.tars[tar], int(offset), int(length)))

    def describe(self, index: int) -> str:
        """Return the tar and the name of a member."""
        return f"{self.tars[self.extents[index, 0]]}: {self.names[index]}"

    def identity(self) -> str:
        """Hash also the places in the tars, and append the tars' sizes and times."""
        about = [(path.stat().st_size, path.stat().st_mtime_ns) for path in self.tars]
        return f"{super().identity()} {hashlib.sha256(self.extents.tobytes()).hexdigest()} {about}"
