"""Sources that are folders or uncompressed tars: ImageFolder, ImageNet and TinyImagenet."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data.imagenet_info import ImageNetInfo

from pipeline.data.images import is_image
from pipeline.data.sources.archive import Tree, open_tree
from pipeline.data.sources.split import Split
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe

FOLDERS = {"train": "train", "val": "val"}
"""Split -> its folder, in the layouts of ImageFolder and ImageNet."""
TINY_FOLDER = "tiny-imagenet-200"
TINY_ANNOTATIONS = "val/val_annotations.txt"


def imagefolder(data: DataRecipe) -> Mapping[str, Split]:
    """Open any folder or uncompressed tar with images in train/<class>/ and val/<class>/.

    Labels follow the sorted class names.
    """
    return class_folders(data, FOLDERS, fixed_size=False)


def imagenet(data: DataRecipe) -> Mapping[str, Split]:
    """Open ImageNet-1k, a folder or uncompressed tar with train/<wnid>/ and val/<wnid>/.

    The 1,000 classes have their official order.
    """
    return class_folders(data, FOLDERS, fixed_size=False, wanted=_imagenet_wnids())


def imagenet100(data: DataRecipe) -> Mapping[str, Split]:
    """Open the first 100 classes of ImageNet-1k, from a folder or tar as for ``imagenet``.

    The other classes need not be there.
    """
    return class_folders(data, FOLDERS, fixed_size=False, wanted=_imagenet_wnids()[:100])


def _imagenet_wnids() -> list[str]:
    """Return the WordNet ids of ImageNet-1k's classes, in their official order."""
    info: Any = ImageNetInfo()
    wnids: list[str] = info.label_names()
    return wnids


def tinyimagenet(data: DataRecipe) -> Mapping[str, Split]:
    """Open TinyImagenet as published, in a folder or uncompressed tar.

    It has train/<wnid>/images/, val/images/ and val/val_annotations.txt.
    """
    layout = f"train/<wnid>/images/, val/images/ and {TINY_ANNOTATIONS}"
    path = _existing(data, layout)
    if (path / TINY_FOLDER).is_dir():
        path = path / TINY_FOLDER
    tree = open_tree(path, FOLDERS.values(), depth=3)
    # A tar may hold the folder, or what is in it.
    top = f"{TINY_FOLDER}/"
    if not any(name.startswith(top) for name in tree.names):
        top = ""
    train: list[tuple[str, str]] = []
    known: dict[str, str] = {}
    for name in tree.names:
        if is_image(name):
            match name.removeprefix(top).split("/"):
                case ["train", wnid, "images", _]:
                    train.append((wnid, name))
                case ["val", "images", file]:
                    known[file] = name
    if not train or not known:
        raise UserError(f"{path}: is not laid out as TinyImagenet, which has {layout}")
    val = []
    for number, line in enumerate(tree.text(top + TINY_ANNOTATIONS).splitlines(), 1):
        file, wnid, *_ = (*line.split("\t"), "", "")
        if file not in known:
            raise UserError(
                f"{path}: {TINY_ANNOTATIONS} line {number}: "
                f"there is no image {file!r} in val/images/"
            )
        val.append((wnid, known[file]))
    return _splits(
        tree, {"train": train, "val": val}, FOLDERS, fixed_size=True, names=wordnet_names
    )


def class_folders(
    data: DataRecipe,
    folders: Mapping[str, str],
    fixed_size: bool,
    wanted: Sequence[str] | None = None,
) -> Mapping[str, Split]:
    """Open splits whose images are <folder>/<class>/<image> below ``data.path``.

    Other files are ignored.

    Args:
        data: the recipe's data section.
        folders: split -> its folder.
        fixed_size: whether images are stored as squares of data.image_size.
        wanted: WordNet ids of the classes, in order; others are left out. None takes all classes of
            the first split, sorted by name.

    Raises:
        UserError: nothing is there, the layout is another one, or a class has no training images.
    """
    layout = " and ".join(
        f"{folder}/<{'wnid' if wanted else 'class'}>/" for folder in folders.values()
    )
    path = _existing(data, layout)
    tree = open_tree(path, folders.values(), depth=2)
    listing: dict[str, list[tuple[str, str]]] = {split: [] for split in folders}
    split_of = {folder: split for split, folder in folders.items()}
    chosen = None if wanted is None else set(wanted)
    for name in tree.names:
        parts = name.split("/")
        if (
            len(parts) == 3
            and parts[0] in split_of
            and is_image(name)
            and (chosen is None or parts[1] in chosen)
        ):
            listing[split_of[parts[0]]].append((parts[1], name))
    for split, images in listing.items():
        if not images:
            raise UserError(
                f"{path}: holds no images in {folders[split]}/<class>/; "
                f"{data.source} needs {layout}"
            )
    if wanted is None:
        return _splits(tree, listing, folders, fixed_size)
    there = {label for label, _ in listing["train"]}
    if missing := [label for label in wanted if label not in there]:
        raise UserError(
            f"{path}: class {missing[0]} has no images in {folders['train']}/{missing[0]}/ "
            f"({len(missing)} of the {len(wanted)} classes of {data.source} are missing); "
            "data.source imagefolder takes any set of classes"
        )
    return _splits(tree, listing, folders, fixed_size, names=wordnet_names)


def wordnet_names(wnids: Sequence[str]) -> tuple[str, ...]:
    """Return readable names of WordNet ids.

    That is the first name of a class; all of its names if two classes share the first; and the id
    after them if two classes share all, as in "crane (n02012849)".

    Raises:
        UserError: one of them is not a WordNet id.
    """
    info: Any = ImageNetInfo("imagenet-22k")
    try:
        full = [info.label_name_to_description(wnid) for wnid in wnids]
    except KeyError as error:
        raise UserError(
            f"{error.args[0]!r} is not the WordNet id of a class of ImageNet, such as n01440764"
        ) from error
    short = [name.split(",")[0] for name in full]
    names = [
        name if short.count(name) == 1 else longer for name, longer in zip(short, full, strict=True)
    ]
    return tuple(
        f"{name} ({wnid})" if names.count(name) > 1 else name
        for name, wnid in zip(names, wnids, strict=True)
    )


def _existing(data: DataRecipe, layout: str) -> Path:
    """Return ``data.path`` and check that it is there; ``layout`` says what it should hold."""
    if data.path is None:
        raise UserError(
            f"data.path is not set; {data.source} needs a folder or a tar file with {layout}"
        )
    path = Path(data.path)
    if not path.is_dir() and not path.is_file():
        raise UserError(
            f"data.path {path}: there is no such file or folder; "
            f"{data.source} needs one with {layout}"
        )
    return path


def _splits(
    tree: Tree,
    listing: Mapping[str, Sequence[tuple[str, str]]],
    folders: Mapping[str, str],
    fixed_size: bool,
    names: Callable[[Sequence[str]], tuple[str, ...]] = tuple,
) -> dict[str, Split]:
    """Make splits from listings.

    Args:
        tree: the files.
        listing: split -> (class, name of the image) of each image.
        folders: split -> its folder, for messages.
        fixed_size: whether images are stored as squares of data.image_size.
        names: sorted classes -> their readable names.

    Raises:
        UserError: a split has a class without training images.
    """
    labels = sorted({label for label, _ in listing["train"]})
    number = {label: index for index, label in enumerate(labels)}
    classes = names(labels)
    for split, images in listing.items():
        if strangers := sorted({label for label, _ in images} - set(labels)):
            raise UserError(
                f"{tree.root}: class {strangers[0]} is in {folders[split]}/ "
                f"but not in {folders['train']}/"
            )
    return {
        split: tree.split(
            classes,
            [number[label] for label, _ in images],
            [name for _, name in images],
            fixed_size,
        )
        for split, images in listing.items()
    }
