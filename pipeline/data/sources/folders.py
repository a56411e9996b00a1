"""Sources that are folders or uncompressed tars: ImageFolder's layout, ImageNet by WordNet id,
TinyImagenet's layout.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from timm.data import ImageNetInfo

from pipeline.data.images import is_image
from pipeline.data.sources.archive import Tree, open_tree
from pipeline.data.sources.split import Split
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe

TINY_FOLDER, TINY_ANNOTATIONS = "tiny-imagenet-200", "val/val_annotations.txt"


def imagefolder(data: DataRecipe) -> Mapping[str, Split]:
    """Any folder or uncompressed tar with train/<class>/ and val/<class>/ images; labels follow the
    sorted class names.
    """
    return class_folders(data, {"train": "train", "val": "val"}, fixed_size=False)


def imagenet(data: DataRecipe) -> Mapping[str, Split]:
    """ImageNet-1k, a folder or uncompressed tar with train/<wnid>/ and val/<wnid>/, in the official
    order of the 1,000 classes.
    """
    return class_folders(
        data,
        {"train": "train", "val": "val"},
        fixed_size=False,
        wanted=ImageNetInfo().label_names(),
    )


def imagenet100(data: DataRecipe) -> Mapping[str, Split]:
    """The first 100 classes of ImageNet-1k, from a folder or tar as for ``imagenet``; the others
    need not be there.
    """
    return class_folders(
        data,
        {"train": "train", "val": "val"},
        fixed_size=False,
        wanted=ImageNetInfo().label_names()[:100],
    )


def tinyimagenet(data: DataRecipe) -> Mapping[str, Split]:
    """TinyImagenet as published: train/<wnid>/images/, val/images/ and val/val_annotations.txt, in
    a folder or uncompressed tar.
    """
    layout = f"train/<wnid>/images/, val/images/ and {TINY_ANNOTATIONS}"
    path = _existing(data, layout)
    path = path / TINY_FOLDER if (path / TINY_FOLDER).is_dir() else path
    tree = open_tree(path, ("train", "val"), depth=3)
    images = [name for name in tree.names if is_image(name)]
    # of a tar
    top = (
        f"{TINY_FOLDER}/" if any(name.startswith(f"{TINY_FOLDER}/") for name in tree.names) else ""
    )
    pattern = [name.removeprefix(top).split("/") for name in images]
    train = [
        (parts[1], name)
        for parts, name in zip(pattern, images, strict=True)
        if len(parts) == 4 and parts[0::2] == ["train", "images"]
    ]
    known = {
        parts[-1]: name
        for parts, name in zip(pattern, images, strict=True)
        if parts[:-1] == ["val", "images"]
    }
    if not train or not known:
        raise UserError(f"{path}: is not laid out as TinyImagenet, which has {layout}")
    val = []
    for number, line in enumerate(tree.text(top + TINY_ANNOTATIONS).splitlines(), 1):
        file, wnid, *_ = (*line.split("\t"), "", "")
        if file not in known:
            raise UserError(
                f"{path}: {TINY_ANNOTATIONS} line {number}: there is no image {file!r} in val/images/"
            )
        val.append((wnid, known[file]))
    return _splits(
        tree,
        {"train": train, "val": val},
        {"train": "train", "val": "val"},
        fixed_size=True,
        names=wordnet_names,
    )


def class_folders(
    data: DataRecipe,
    folders: Mapping[str, str],
    fixed_size: bool,
    wanted: Sequence[str] | None = None,
) -> Mapping[str, Split]:
    """Splits from <folder>/<class>/<image> below ``data.path``; other files are not looked at.

    Args:
        folders: split -> its folder.
        wanted: WordNet ids of the classes, in order, others being left out. None: all classes of
            the first split, sorted by name.

    Raises:
        UserError: nothing there, another layout, or a class without training images.
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
                f"{path}: holds no images in {folders[split]}/<class>/; {data.source} needs {layout}"
            )
    if wanted is None:
        return _splits(tree, listing, folders, fixed_size)
    there = {label for label, _ in listing["train"]}
    if missing := [label for label in wanted if label not in there]:
        raise UserError(
            f"{path}: class {missing[0]} has no images in {folders['train']}/{missing[0]}/ ({len(missing)} of the {len(wanted)} classes "
            f"of {data.source} are missing); data.source imagefolder takes any set of classes"
        )
    return _splits(tree, listing, folders, fixed_size, names=wordnet_names)


def wordnet_names(wnids: Sequence[str]) -> tuple[str, ...]:
    """What people call these WordNet ids: the first name, more of them where two are alike, then
    the id too ("crane (n02012849)").

    Raises:
        UserError: one of them is no WordNet id.
    """
    info = ImageNetInfo("imagenet-22k")
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
    if data.path is None:
        raise UserError(
            f"data.path is not set; {data.source} needs a folder or a tar file with {layout}"
        )
    path = Path(data.path)
    if not path.is_dir() and not path.is_file():
        raise UserError(
            f"data.path {path}: there is no such file or folder; {data.source} needs one with {layout}"
        )
    return path


def _splits(
    tree: Tree,
    listing: Mapping[str, Sequence[tuple[str, str]]],
    folders: Mapping[str, str],
    fixed_size: bool,
    names=tuple,
) -> dict[str, Split]:
    """Splits from (class, name of the image) of each; ``names`` turns the sorted classes into what
    people call them.
    """
    labels = sorted({label for label, _ in listing["train"]})
    number = {label: index for index, label in enumerate(labels)}
    classes = names(labels)
    for split, images in listing.items():
        if strangers := sorted({label for label, _ in images} - set(labels)):
            raise UserError(
                f"{tree.root}: class {strangers[0]} is in {folders[split]}/ but not in {folders['train']}/"
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
