"""The writing of a source's images to ``train.beton`` and ``val.beton``, with their manifest.

Files are written under temporary names and renamed; the manifest comes last. A journal keeps track
of what is finished, so that the same command continues after an interruption. The files' bytes
depend on the source and the settings alone: neither on the number of processes nor on
interruptions.
"""

import fcntl
import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import PIL
import xxhash
from tqdm import tqdm

from pipeline.data import beton
from pipeline.data.beton import measure
from pipeline.data.chunk_journal import Chunk, ChunkJournal
from pipeline.data.chunk_writer import write_chunks
from pipeline.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    SplitFile,
    open_manifest,
    path_name,
    publish,
    write_manifest,
)
from pipeline.data.sources import open_source
from pipeline.data.sources.split import Split
from pipeline.data.stored_size import largest_bytes
from pipeline.distributed import run_collectively
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe, Recipe

log = logging.getLogger(__name__)

STORING_SETTINGS = (
    "image_size",
    "write_mode",
    "compress_probability",
    "jpeg_quality",
    "max_resolution",
    "chunk_size",
)
"""Settings that decide the stored bytes, together with the versions of FFCV, Pillow and OpenCV."""


def prepare(recipe: Recipe) -> Path:
    """Prepare the recipe's data, or return at once if that has been done.

    The main process works, and the others wait for it. Errors are raised on every process.

    Returns:
        ``recipe.data.folder``.

    Raises:
        UserError: the source is unknown or broken, an image is broken, or the folder was prepared
            with other settings.
        OSError: the disk is full or failing, or the folder cannot be written.
    """
    run_collectively(lambda: _prepare(recipe.data), main_only=True)
    return recipe.data.folder


def _prepare(data: DataRecipe) -> None:
    if _is_prepared(data):
        return
    try:
        data.folder.mkdir(parents=True, exist_ok=True)
        with _locked(data.folder):
            if not _is_prepared(data):
                _write_all(data)
    except OSError as error:
        if error.errno is None:
            raise
        reason = f"{error.strerror}; when that is remedied, the same command continues"
        raise OSError(error.errno, reason, str(error.filename or data.folder)) from error


def _is_prepared(data: DataRecipe) -> bool:
    try:
        manifest = open_manifest(data.folder)
    except UserError:
        # The folder is empty, or holds remains that are worth nothing.
        return False
    manifest.require(data)
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other jobs that want to prepare the same data."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another process that prepares it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_all(data: DataRecipe) -> None:
    splits = open_source(data)
    files = {name: data.folder / f"{name}.beton.tmp" for name in splits}
    journals = {
        name: ChunkJournal(files[name], _identity(split, data)) for name, split in splits.items()
    }
    try:
        entries = {
            name: _write_split(files[name], journals[name], split, data, name)
            for name, split in splits.items()
        }
        (data.folder / MANIFEST_NAME).unlink(missing_ok=True)
        for path in files.values():
            publish(path, path.with_suffix(""))
        write_manifest(data.folder, _manifest(splits["train"], entries, data))
        for journal in journals.values():
            journal.remove()
    finally:
        for name, journal in journals.items():
            # There is nothing to continue from.
            if not journal.chunks:
                files[name].unlink(missing_ok=True)
                journal.remove()


def _manifest(train: Split, entries: dict[str, SplitFile], data: DataRecipe) -> Manifest:
    return Manifest(
        source=data.source,
        path_name=path_name(data),
        image_size=data.image_size,
        write_mode=data.write_mode,
        fixed_size=train.fixed_size,
        classes=train.classes,
        splits=entries,
        ffcv=importlib.metadata.version("ffcv"),
        max_resolution=data.max_resolution,
        jpeg_quality=data.jpeg_quality,
        compress_probability=data.compress_probability,
    )


def _identity(split: Split, data: DataRecipe) -> str:
    """Hash whatever decides the bytes of the file, except the content of the source's files."""
    settings = {key: value for key, value in asdict(data).items() if key in STORING_SETTINGS}
    # OpenCV is asked itself, as any of its several distributions may be installed.
    versions = {
        "ffcv": importlib.metadata.version("ffcv"),
        "pillow": PIL.__version__,
        "opencv": cv2.__version__,
    }
    return hashlib.sha256(f"{split.identity()} {settings} {versions}".encode()).hexdigest()


def _write_split(
    path: Path, journal: ChunkJournal, split: Split, data: DataRecipe, name: str
) -> SplitFile:
    """Write the file of one split, or continue it, and return its entry in the manifest."""
    page = beton.page_size(largest_bytes(data, split.fixed_size))
    if journal.foreign:
        log.warning(
            "%s: was begun from another source or with other settings; it is begun again", path
        )
    if journal.chunks:
        done = sum(len(chunk.images) for chunk in journal.chunks)
        log.info("%s: continues after %d images", path, done)
        os.truncate(path, journal.chunks[-1].end)
    else:
        beton.begin(path, page)
    write_chunks(path, journal, split, data, page, name)
    chunks = journal.chunks
    images = np.concatenate([chunk.images for chunk in chunks])
    skipped = [
        (split.describe(index), reason) for chunk in chunks for index, reason in chunk.broken
    ]
    if not len(images):
        raise UserError(
            f"{skipped[0][0]}: {skipped[0][1]}, and no other image of {name} can be read"
        )
    labels = split.labels[images["source"].astype(np.int64)]
    beton.finish(path, images, labels, page)
    digest = _digest(path, chunks, name)
    size, samples, tables = measure(path)
    counts = np.bincount(labels, minlength=len(split.classes))
    return SplitFile(
        file=path.stem,
        bytes=size,
        samples=samples,
        class_counts=tuple(int(count) for count in counts),
        tables_sha256=tables,
        xxh128=digest,
        skipped=tuple(skipped),
    )


def _digest(path: Path, chunks: list[Chunk], name: str) -> str:
    """Read the file back, check its chunks, and return its XXH128.

    Raises:
        UserError: a chunk is not what was written.
    """
    digest = xxhash.xxh3_128()
    total = path.stat().st_size
    parts = [
        (0, chunks[0].begin, None),
        *((chunk.begin, chunk.end, chunk.xxh64) for chunk in chunks),
        (chunks[-1].end, total, None),
    ]
    progress = tqdm(
        total=total, desc=f"reading {name} back", unit="B", unit_scale=True, leave=False
    )
    with open(path, "rb") as file, progress as bar:
        for begin, end, known in parts:
            content = file.read(end - begin)
            if known is not None and xxhash.xxh3_64_hexdigest(content) != known:
                raise UserError(
                    f"{path}: bytes {begin} to {end} are not those that were written; "
                    "the disk may be failing: remove the file"
                )
            digest.update(content)
            bar.update(len(content))
    return digest.hexdigest()
