"""Files below a folder, or members of an uncompressed tar, under one interface.

Tars with members that point outside are refused.
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

Extent = tuple[int, int]
"""Offset and length of a member in bytes."""


@dataclass(frozen=True)
class Tree:
    """The files of a folder or a tar."""

    root: Path
    """The folder, or the tar if there are ``extents``."""
    names: Sequence[str]
    """Names of the files, relative to ``root``."""
    extents: dict[str, Extent] | None = None
    """Name -> place in the tar; None for a folder."""

    def split(
        self,
        classes: tuple[str, ...],
        labels: Sequence[int],
        names: Sequence[str],
        fixed_size: bool,
    ) -> Split:
        """Return the images ``names`` with their ``labels``."""
        numbers, chosen = np.array(labels, np.int64), tuple(names)
        if self.extents is None:
            return FileSplit(classes, numbers, fixed_size, self.root, chosen)
        extents = np.array([(0, *self.extents[name]) for name in chosen], np.int64).reshape(-1, 3)
        return TarSplit(classes, numbers, fixed_size, (self.root,), chosen, extents)

    def text(self, name: str) -> str:
        """Read the text file ``name``.

        Raises:
            UserError: there is no such file, or it is not text.
        """
        try:
            if self.extents is None:
                content = read_file(self.root / name)
            else:
                content = read_file(self.root, *self.extents[name])
            return content.decode()
        except (KeyError, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.root}: {name} is missing or cannot be read ({type(error).__name__})"
            ) from error


def open_tree(path: Path, folders: Iterable[str], depth: int) -> Tree:
    """List the files of a tar, or those below some folders of a folder.

    Args:
        path: the tar or the folder.
        folders: folders in ``path`` to list; a tar is listed completely.
        depth: levels of folders to list.

    Raises:
        UserError: the folder cannot be listed; or the tar is compressed, damaged, or has members
            that are links or point outside.
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
    """Return the files below ``folder``, each as ``name``/...; a ``title`` shows progress."""
    names = []
    with os.scandir(folder) as listing:
        for entry in tqdm(listing, f"listing {title}", disable=title is None, leave=False):
            below = f"{name}/{entry.name}"
            if not entry.is_dir():
                names.append(below)
            elif depth:
                # The depth is bounded, as a link may lead back up.
                names += _files(entry.path, below, depth - 1)
    return names


def index_tar(path: Path, quiet: bool = False) -> dict[str, Extent]:
    """Find the place of every file in the tar.

    A later member replaces an earlier one of the same name, as tar does it.

    Raises:
        UserError: the file is not an uncompressed tar, is damaged, or has members that are links or
            point outside.
    """
    places: dict[str, Extent] = {}
    try:
        size = path.stat().st_size
        title = f"indexing {path.name}"
        # The bar is made after the tar is open: what cannot be opened shows none.
        with (
            tarfile.open(path, "r:") as tar,
            tqdm(None, title, size, False, unit="B", unit_scale=True, disable=quiet) as bar,
        ):
            for member in tar:
                bar.update(member.offset_data + member.size - bar.n)
                _check_member(path, member, size)
                if member.isreg():
                    places[str(PurePosixPath(member.name))] = (member.offset_data, member.size)
            end = tar.offset
        # tarfile takes a damaged header for the end of the archive; the real end is a block of
        # zeros.
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"{path}: is cut off or damaged at byte {end}; copy it again")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        # Numbers in a damaged header cause the last two.
        raise UserError(f"{path}: cannot be read as an uncompressed tar file ({error})") from error
    return places


def _check_member(path: Path, member: tarfile.TarInfo, size: int) -> None:
    """Check that a member is a plain file or a folder inside the tar of ``size`` bytes."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(
            f"{path}: member {member.name!r} points outside the archive; such archives are refused"
        )
    if not (member.isdir() or member.isreg()) or member.issparse():
        raise UserError(
            f"{path}: member {member.name!r} is a link, a device or a sparse file; "
            "only plain files are read"
        )
    if member.offset_data + member.size > size:
        raise UserError(f"{path}: is cut off or damaged at byte {member.offset}; copy it again")
