"""Data sources: a name in a recipe -> the images and labels of its train and val split, before anything is written.

A new data set is one entry in ``SOURCES``: a function from the recipe's data section to ``{"train": Split, "val": Split}``.
"""

import difflib
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.recipe import DataRecipe

STORED_MARGIN = 256 / 224  # stored shorter side / image size, for images that are cropped when they are loaded
MAX_ASPECT = 2  # the longer side of such an image is centre-cropped to this multiple of the shorter one
DIGITS_VAL = 360  # of 1,797


@dataclass(frozen=True)
class Split:
    """Indexed RGB images of one split. Picklable; reads happen in ``read``, so it can be shared with forked processes."""

    classes: tuple[str, ...]
    labels: np.ndarray  # (N,) int64
    size: int  # side of the images that the model sees
    fixed_size: bool  # True: images are size x size here; False: their size varies and the loader crops them

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(H, W, 3) uint8 pixels as they are to be stored, and the label. Raises what the reader raises on a broken image."""
        image = self.read(index)
        fitted = _square(image, self.size) if self.fixed_size else _bounded(image, stored_side(self.size))
        return np.asarray(fitted), int(self.labels[index])

    def read(self, index: int) -> Image.Image:
        """The image as the source has it, in RGB."""
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """Where image ``index`` comes from, for messages."""
        raise NotImplementedError


@dataclass(frozen=True)
class ArraySplit(Split):
    """Images that are in memory."""

    images: np.ndarray  # (N, H, W, 3) uint8
    name: str

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"


@dataclass(frozen=True)
class FileSplit(Split):
    """Images that are files below a folder."""

    root: Path
    names: tuple[str, ...]

    def read(self, index: int) -> Image.Image:
        return _rgb((self.root / self.names[index]).read_bytes())

    def describe(self, index: int) -> str:
        return str(self.root / self.names[index])


@dataclass(frozen=True)
class TarSplit(Split):
    """Images that are members of an uncompressed tar file, read in place."""

    tar: Path
    names: tuple[str, ...]
    extents: np.ndarray  # (N, 2) int64: offset and length of each member's bytes

    def read(self, index: int) -> Image.Image:
        offset, length = self.extents[index]
        with open(self.tar, "rb") as file:
            file.seek(offset)
            return _rgb(file.read(length))

    def describe(self, index: int) -> str:
        return f"{self.tar}: {self.names[index]}"


def stored_side(size: int) -> int:
    """Upper bound of the shorter side of stored images whose size varies; smaller images are stored as they are."""
    return math.ceil(size * STORED_MARGIN)


def open_source(data: DataRecipe) -> Mapping[str, Split]:
    """The splits "train" and "val" of the recipe's source. Raises UserError: unknown source, or nothing valid at its path."""
    if data.source not in SOURCES:
        close = difflib.get_close_matches(data.source, SOURCES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"valid: {', '.join(SOURCES)}"
        raise UserError(f"data.source is {data.source!r}: there is no such source; {hint}")
    return SOURCES[data.source](data)


def digits(data: DataRecipe) -> Mapping[str, Split]:
    """scikit-learn's 1,797 digits, 8 x 8 pixels of 17 levels: a fixed stratified split into 1,437 and 360, whatever the recipe's seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=3)  # (N, 8, 8) -> (N, 8, 8, 3)
    parts = train_test_split(np.arange(len(rgb)), test_size=DIGITS_VAL, random_state=0, stratify=bunch.target)
    classes = tuple(str(name) for name in bunch.target_names)
    return {
        split: ArraySplit(classes, bunch.target[part].astype(np.int64), data.image_size, True, rgb[part], f"digits {split}")
        for split, part in zip(("train", "val"), parts, strict=True)
    }


def cifar10(data: DataRecipe) -> Mapping[str, Split]:
    """CIFAR-10: a folder or tar with train/<class>/ and test/<class>/, torchvision's download folder, or (path null) a download."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    root = Path(data.prepared) / "downloads"
    if data.path is not None:
        path = Path(data.path)
        archive = path / CIFAR10.filename
        if (path / CIFAR10.base_folder).is_dir():
            root = path
        elif not archive.is_file():
            return _image_splits(data, {"train": "train", "val": "test"}, fixed_size=True)
        elif check_integrity(str(archive), CIFAR10.tgz_md5):
            extract_archive(str(archive), str(root))
        else:
            raise UserError(f"{archive}: is damaged (its MD5 is not the published one); fetch it again")
    try:
        parts = {split: CIFAR10(str(root), train=split == "train", download=data.path is None) for split in ("train", "val")}
    except (OSError, RuntimeError) as error:
        what = "the download failed" if data.path is None else "is incomplete"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cifar10 in {root}: {what} ({reason}); fetch {CIFAR10.url} on a machine with internet and set data.path to its folder"
        ) from error
    return {
        split: ArraySplit(tuple(part.classes), np.array(part.targets, np.int64), data.image_size, True, part.data, f"cifar10 {split}")
        for split, part in parts.items()
    }


def imagefolder(data: DataRecipe) -> Mapping[str, Split]:
    """Any folder or uncompressed tar with train/<class>/ and val/<class>/ images; labels follow the sorted class names."""
    return _image_splits(data, {"train": "train", "val": "val"}, fixed_size=False)


SOURCES: dict[str, Callable[[DataRecipe], Mapping[str, Split]]] = {"digits": digits, "cifar10": cifar10, "imagefolder": imagefolder}


def _image_splits(data: DataRecipe, folders: Mapping[str, str], fixed_size: bool) -> Mapping[str, Split]:
    """Splits from <folder>/<class>/<image> below ``data.path``; other files are not looked at."""
    layout = " and ".join(f"{folder}/<class>/" for folder in folders.values())
    if data.path is None:
        raise UserError(f"data.path is not set; {data.source} needs a folder or a tar file with {layout}")
    path = Path(data.path)
    if path.is_dir():
        try:
            names, extents = _list_folder(path, folders.values()), None
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error
    elif path.is_file():
        members = _index_tar(path)
        names, extents = list(members), members
    else:
        raise UserError(f"data.path {path}: there is no such file or folder; {data.source} needs one with {layout}")

    known = Image.registered_extensions()
    listing: dict[str, list[tuple[str, str]]] = {folder: [] for folder in folders.values()}
    for name in sorted(names):
        parts = name.split("/")
        if len(parts) == 3 and parts[0] in listing and not parts[2].startswith(".") and PurePosixPath(name).suffix.lower() in known:
            listing[parts[0]].append((parts[1], name))
    for folder, images in listing.items():
        if not images:
            raise UserError(f"{path}: holds no images in {folder}/<class>/; {data.source} needs {layout}")
    classes = tuple(sorted({label for label, _ in listing[folders["train"]]}))
    number = {label: index for index, label in enumerate(classes)}
    splits: dict[str, Split] = {}
    for split, folder in folders.items():
        if strangers := sorted({label for label, _ in listing[folder]} - set(classes)):
            raise UserError(f"{path}: class {strangers[0]} is in {folder}/ but not in {folders['train']}/")
        labels = np.array([number[label] for label, _ in listing[folder]], np.int64)
        chosen = tuple(name for _, name in listing[folder])
        if extents is None:
            splits[split] = FileSplit(classes, labels, data.image_size, fixed_size, path, chosen)
        else:
            places = np.array([extents[name] for name in chosen], np.int64)
            splits[split] = TarSplit(classes, labels, data.image_size, fixed_size, path, chosen, places)
    return splits


def _list_folder(root: Path, folders: Iterable[str]) -> list[str]:
    names = []
    for folder in folders:
        if (root / folder).is_dir():
            for label in tqdm(
                sorted(entry.name for entry in os.scandir(root / folder) if entry.is_dir()), f"listing {folder}", leave=False
            ):
                names += [f"{folder}/{label}/{entry.name}" for entry in os.scandir(root / folder / label)]
    return names


def _index_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Name -> (offset, length) of every file in the tar. A later member replaces an earlier one of the same name, as in tar."""
    places: dict[str, tuple[int, int]] = {}
    try:
        with (
            tarfile.open(path, "r:") as tar,
            tqdm(total=path.stat().st_size, desc=f"indexing {path.name}", unit="B", unit_scale=True, leave=False) as bar,
        ):
            for member in tar:
                bar.update(member.offset_data + member.size - bar.n)
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{path}: member {member.name!r} points outside the archive; such archives are refused")
                if not (member.isdir() or member.isreg()) or member.issparse():
                    raise UserError(f"{path}: member {member.name!r} is a link, a device or a sparse file; only plain files are read")
                if member.isreg():
                    places[str(name)] = (member.offset_data, member.size)
            end = tar.offset
        with open(path, "rb") as file:  # tarfile takes a damaged header for the end of the archive; the real end is a block of zeros
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"{path}: is cut off or damaged at byte {end}; copy it again")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: cannot be read as an uncompressed tar file ({error})") from error
    return places


def _rgb(content: bytes) -> Image.Image:
    """Decode to 8-bit RGB, upright as its EXIF orientation says; 16-bit grey is scaled to 8 bits, transparency is dropped."""
    with Image.open(BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # convert() would clip 16-bit values at 255
        upright = Image.fromarray(np.clip(np.round(np.asarray(upright) / 257), 0, 255).astype(np.uint8))
    return upright.convert("RGB")


def _square(image: Image.Image, side: int) -> Image.Image:
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)


def _bounded(image: Image.Image, side: int) -> Image.Image:
    """Centre-crop to an aspect ratio of at most MAX_ASPECT, then shrink the shorter side to ``side`` where it is larger."""
    width, height = image.size
    crop_width, crop_height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    image = image.crop((left, top, left + crop_width, top + crop_height))
    scale = side / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(round(length * scale), side) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
