"""The .beton files that a job reads: the prepared ones, or copies on the disk of the node."""

import fcntl
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import xxhash
from tqdm import tqdm

from pipeline.data.beton import measure
from pipeline.data.manifest import Manifest, SplitFile, publish
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe

CHUNK_BYTES = 1 << 24
"""Bytes that are copied at a time."""
SPARE_BYTES = 1 << 28
"""Bytes that are left free on the node's disk."""


def readable_file(data: DataRecipe, manifest: Manifest, split: str) -> Path:
    """Return the .beton file to read for ``split``, and copy it to the node's disk if asked to.

    With ``data.storage: stage_local``, the first process of a node that asks makes the copy. A copy
    that is whole is used again, for example after a requeue on the same node.

    Raises:
        UserError: ``data.scratch`` cannot be written, or has no room.
    """
    wanted = manifest.splits[split]
    original = data.folder / wanted.file
    if data.storage == "page_cache":
        return original
    folder = _scratch(data) / f"coda-{os.getuid()}" / manifest.sha256[:16]
    copy = folder / wanted.file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            # The other processes of the node wait here for the first.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(copy, (wanted.bytes, wanted.samples, wanted.tables_sha256)):
                copy.unlink(missing_ok=True)
                _copy(original, copy, wanted)
    except OSError as error:
        raise UserError(
            f"{copy}: the data cannot be staged ({error.strerror or error}); "
            "choose another data.scratch"
        ) from error
    return copy


def _scratch(data: DataRecipe) -> Path:
    place = os.path.expandvars(data.scratch or tempfile.gettempdir())
    if "$" in place:
        raise UserError(
            f"data.scratch is {data.scratch!r}, "
            "but that environment variable is not set on this node"
        )
    return Path(place)


def _is_whole(path: Path, wanted: tuple[int, int, str]) -> bool:
    with suppress(UserError):
        return measure(path) == wanted
    return False


def _copy(source: Path, target: Path, wanted: SplitFile) -> None:
    """Copy a file under a temporary name, check its hash, and give it its name."""
    free = shutil.disk_usage(target.parent).free
    if free < wanted.bytes + SPARE_BYTES:
        raise UserError(
            f"{target.parent}: has {free / 1e9:.1f} GB free and {source.name} needs "
            f"{wanted.bytes / 1e9:.1f}; choose another data.scratch, or data.storage=page_cache"
        )
    temporary, digest = target.with_name(f"{target.name}.tmp"), xxhash.xxh128()
    progress = tqdm(
        total=wanted.bytes,
        desc=f"staging {source.name}",
        unit="B",
        unit_scale=True,
        file=sys.stderr,
    )
    try:
        with source.open("rb") as reading, temporary.open("wb") as writing, progress as bar:
            while block := reading.read(CHUNK_BYTES):
                digest.update(block)
                writing.write(block)
                bar.update(len(block))
        if wanted.xxh128 not in ("", digest.hexdigest()):
            raise UserError(
                f"{source}: is not what its manifest says, byte by byte; "
                "`coda verify` shows the damage"
            )
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
