"""The manifest beside prepared .beton files: their contents, and the proof that they are whole.

FFCV opens an unfinished or truncated file without complaint and then hangs, or reads outside it.
The header, the table of samples at the start and the table of addresses at the end are therefore
checked here before FFCV sees a file.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data.beton import REMEDY, measure
from pipeline.errors import UserError
from pipeline.files import sync, write_atomically
from pipeline.recipe.schema import MAX_RESOLUTION, DataRecipe

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class SplitFile:
    """One .beton file."""

    file: str
    bytes: int
    samples: int
    class_counts: tuple[int, ...]
    tables_sha256: str
    """SHA-256 of the header and both tables."""
    xxh128: str = ""
    """XXH128 of the whole file, as xxh128sum prints it; empty if an earlier version wrote it."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Place and error of each image that is left out."""


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of prepared files."""

    source: str
    """data.source of the recipe."""
    path_name: str | None
    """Last part of data.path; the rest of it may differ between machines."""
    image_size: int
    """data.image_size of the recipe."""
    write_mode: str
    """data.write_mode of the recipe."""
    fixed_size: bool
    """Whether images are stored at image_size; otherwise they are cropped when they are loaded."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    splits: Mapping[str, SplitFile]
    """The files of the splits "train" and "val"."""
    ffcv: str
    """Version of FFCV that wrote the files."""
    max_resolution: int | None = None
    """data.max_resolution of the recipe."""
    jpeg_quality: int = 90
    """data.jpeg_quality of the recipe."""
    compress_probability: float = 0.5
    """data.compress_probability of the recipe."""
    sha256: str = ""
    """SHA-256 of manifest.json itself."""

    def require(self, data: DataRecipe) -> None:
        """Check that the files were prepared with the settings ``data``.

        Raises:
            UserError: they were prepared with other settings.
        """
        wanted: dict[str, tuple[Any, Any]] = {
            "data.source": (self.source, data.source),
            "data.path": (self.path_name, path_name(data)),
            "data.image_size": (self.image_size, data.image_size),
            "data.write_mode": (self.write_mode, data.write_mode),
            "data.max_resolution": (self.max_resolution, data.max_resolution),
        }
        if data.write_mode != "raw":
            wanted["data.jpeg_quality"] = (self.jpeg_quality, data.jpeg_quality)
        if data.write_mode == "proportion":
            wanted["data.compress_probability"] = (
                self.compress_probability,
                data.compress_probability,
            )
        differences = [
            f"{key} {found} (recipe: {asked})"
            for key, (found, asked) in wanted.items()
            if found != asked
        ]
        if differences:
            raise UserError(
                f"{data.folder}: was prepared with {', '.join(differences)}; "
                "remove the folder or point data.prepared to another place"
            )


def path_name(data: DataRecipe) -> str | None:
    """Return the last part of ``data.path``, or None if it is not set."""
    return None if data.path is None else Path(data.path).resolve().name


def open_manifest(folder: str | Path) -> Manifest:
    """Read ``folder``/manifest.json and check the files that it lists: size, header, tables.

    Raises:
        UserError: there is no manifest, or it or one of its files is damaged.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    try:
        manifest = _parse(json.loads(content), hashlib.sha256(content).hexdigest())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: is damaged or of another version ({reason}); remove it and {REMEDY}"
        ) from error
    for split in manifest.splits.values():
        if measure(path.parent / split.file) != (split.bytes, split.samples, split.tables_sha256):
            raise UserError(
                f"{path.parent / split.file}: is not the file that {MANIFEST_NAME} describes; "
                f"{REMEDY}"
            )
    return manifest


def _parse(tree: dict[str, Any], sha256: str) -> Manifest:
    """Turn the content of manifest.json into a manifest.

    Raises:
        ValueError: its version or its values are wrong. Content of another form raises a
            TypeError, KeyError or AttributeError.
    """
    if tree.pop("version") != MANIFEST_VERSION:
        raise ValueError(f"not of version {MANIFEST_VERSION}")
    splits = {name: _split_file(**entry) for name, entry in tree.pop("splits").items()}
    manifest = Manifest(
        **{**tree, "splits": splits, "classes": tuple(tree["classes"]), "sha256": sha256}
    )
    if set(splits) != {"train", "val"}:
        raise ValueError(f"splits are {sorted(splits)}")
    if type(manifest.image_size) is not int or not 0 < manifest.image_size <= MAX_RESOLUTION:
        raise ValueError(f"image_size is {manifest.image_size!r}")
    if any(
        len(split.class_counts) != len(manifest.classes) or sum(split.class_counts) != split.samples
        for split in splits.values()
    ):
        raise ValueError("the images per class do not add up")
    names = [*manifest.classes, manifest.source, *(split.file for split in splits.values())]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name is not a string")
    return manifest


def _split_file(
    class_counts: Sequence[int], skipped: Sequence[Sequence[str]] = (), **entry: Any
) -> SplitFile:
    return SplitFile(
        class_counts=tuple(class_counts),
        skipped=tuple((where, reason) for where, reason in skipped),
        **entry,
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``folder``/manifest.json atomically."""
    tree = {"version": MANIFEST_VERSION, **asdict(manifest)}
    del tree["sha256"]
    write_atomically(folder / MANIFEST_NAME, (json.dumps(tree, indent=1) + "\n").encode())


def publish(temporary: Path, final: Path) -> None:
    """Give a finished temporary file its final name, once its bytes are on the disk."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)
