"""Files below a folder, or members of an uncompressed tar, under one interface. Members that point
outside the tar are refused.
"""

import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from pipeline.data.images import read_file
from pipeline.data.sources.split import FileSplit, Split, TarSplit
from pipeline.errors import UserError

# offset and length in bytes
Extent = tuple[int, int]


@dataclass(frozen=True)
class Tree:
    """Names of files, relative to ``root``, which is a folder or, if there are ``extents``, a tar."""

    root: Path
    names: Sequence[str]
    extents: dict[str, Extent] | None = None

    def split(
        self,
        classes: tuple[str, ...],
        labels: Sequence[int],
        names: Sequence[str],
        fixed_size: bool,
    ) -> Split:
        """The images ``names`` with their ``labels``."""
        numbers, chosen = np.array(labels, np.int64), tuple(names)
        if self.extents is None:
            return FileSplit(classes, numbers, fixed_size, self.root, chosen)
        extents = np.array([(0, *self.extents[name]) for name in chosen], np.int64).reshape(-1, 3)
        return TarSplit(classes, numbers, fixed_size, (self.root,), chosen, extents)

    def text(self, name: str) -> str:
        """The content of the text file ``name``. Raises UserError: there is none."""
        try:
            content = (
                read_file(self.root / name)
                if self.extents is None
                else read_file(self.root, *self.extents[name])
            )
            return content.decode()
        except (KeyError, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.root}: {name} is missing or cannot be read ({type(error).__name__})"
            ) from error


def open_tree(path: Path, folders: Iterable[str], depth: int) -> Tree:
    """Everything in the tar ``path``; or what lies below the ``folders`` of the folder ``path``,
    which nest to ``depth`` at most.

    Raises:
        UserError: it cannot be listed; or the tar is compressed, damaged, or has members that are
            links or lie outside of it.
    """
    if path.is_file():
        extents = index_tar(path)
        return Tree(path, sorted(extents), extents)
    try:
        names: list[str] = []
        for folder in folders:
            if (path / folder).is_dir():
                names += _files(path / folder, folder, depth - 1, folder)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error
    return Tree(path, sorted(names))


def _files(folder: Path | str, name: str, depth: int, title: str | None = None) -> list[str]:
    names = []
    with os.scandir(folder) as listing:
        for entry in tqdm(listing, f"listing {title}", disable=title is None, leave=False):
            below = f"{name}/{entry.name}"
            if not entry.is_dir():
                names.append(below)
            elif depth:
                # bounded, as a link may lead back up
                names += _files(entry.path, below, depth - 1)
    return names


def index_tar(path: Path, quiet: bool = False) -> dict[str, Extent]:
    """The place of every file in the tar. A later member replaces an earlier one of the same name,
    as in tar.

    Raises:
        UserError: not an uncompressed tar, damaged, or with members that are links or lie outside
            of it.
    """
    places: dict[str, Extent] = {}
    try:
        size = path.stat().st_size
        with (
            tarfile.open(path, "r:") as tar,
            tqdm(
                total=size,
                desc=f"indexing {path.name}",
                unit="B",
                unit_scale=True,
                leave=False,
                disable=quiet,
            ) as bar,
        ):
            for member in tar:
                bar.update(member.offset_data + member.size - bar.n)
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(
                        f"{path}: member {member.name!r} points outside the archive; such archives are refused"
                    )
                if not (member.isdir() or member.isreg()) or member.issparse():
                    raise UserError(
                        f"{path}: member {member.name!r} is a link, a device or a sparse file; only plain files are read"
                    )
                if member.offset_data + member.size > size:
                    raise UserError(
                        f"{path}: is cut off or damaged at byte {member.offset}; copy it again"
                    )
                if member.isreg():
                    places[str(name)] = (member.offset_data, member.size)
            end = tar.offset
        # tarfile takes a damaged header for the end of the archive; the real end is a block of
        # zeros
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"{path}: is cut off or damaged at byte {end}; copy it again")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        # the last two from numbers in a damaged header
        raise UserError(f"{path}: cannot be read as an uncompressed tar file ({error})") from error
    return places
