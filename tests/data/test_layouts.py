"""ImageNet by WordNet id, TinyImagenet, CSV, WebDataset shards and torchvision's data sets, each
from real files of its layout.
"""

import io
import json
import shutil
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image
from test_sources import member, pack

from pipeline.data.sources import open_source
from pipeline.data.sources.folders import wordnet_names
from pipeline.errors import UserError


def picture(shade: int, size=(20, 16), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def shade(split, index) -> int:
    return int(np.asarray(split.read(index))[0, 0, 0])


def write(root, files) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def refused(recipe, *words) -> None:
    with pytest.raises(UserError) as error:
        open_source(recipe.data)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


# ImageNet


def wnids():
    from timm.data import ImageNetInfo

    return ImageNetInfo().label_names()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A folder with one training image of each of the 1,000 classes, in reverse order, and two of
    val.
    """
    root = tmp_path_factory.mktemp("imagenet")
    write(
        root,
        {
            f"train/{wnid}/{wnid}_1.JPEG": picture(number % 256)
            for number, wnid in reversed(list(enumerate(wnids())))
        },
    )
    write(
        root,
        {f"val/{wnids()[number]}/ILSVRC2012_val_1.JPEG": picture(number) for number in (7, 150)},
    )
    return root


def test_imagenet_has_the_official_order_and_names(imagenet, make_recipe):
    splits = open_source(make_recipe(source="imagenet", path=str(imagenet)).data)
    train, val = splits["train"], splits["val"]
    assert train.labels.tolist() == list(range(1000)) and all(
        shade(train, index) == index % 256 for index in (0, 99, 999)
    )
    assert val.labels.tolist() == [7, 150] and shade(val, 1) == 150
    # as in the list of the challenge, https://image-net.org/challenges/LSVRC/2012/browse-synsets
    known = {
        0: "tench",
        1: "goldfish",
        207: "golden retriever",
        282: "tiger cat",
        388: "giant panda",
        999: "toilet tissue",
    }
    assert {number: train.classes[number] for number in known} == known
    assert len(set(train.classes)) == 1000
    # the bird and the machine
    assert train.classes[134] == "crane (n02012849)" and train.classes[517] == "crane (n03126707)"


def test_imagenet100_is_the_first_hundred_classes(imagenet, make_recipe):
    splits = open_source(make_recipe(source="imagenet100", path=str(imagenet)).data)
    assert (
        splits["train"].labels.tolist() == list(range(100))
        and splits["train"].classes == wordnet_names(wnids())[:100]
    )
    assert splits["val"].labels.tolist() == [7]


def test_imagenet_without_a_class_is_refused(imagenet, make_recipe, tmp_path):
    write(tmp_path, {f"{split}/n01440764/1.JPEG": picture(0) for split in ("train", "val")})
    refused(
        make_recipe(source="imagenet100", path=str(tmp_path)),
        "class n01443537",
        "99 of the 100 classes",
        "imagefolder",
    )
    with pytest.raises(UserError, match="'cat' is not the WordNet id"):
        wordnet_names(["cat"])


# TinyImagenet


@pytest.fixture
def tiny(tmp_path):
    root, ids = tmp_path / "tiny-imagenet-200", ("n02124075", "n01443537")
    write(
        root,
        {
            f"train/{wnid}/images/{wnid}_{n}.JPEG": picture(10 * c + n)
            for c, wnid in enumerate(ids)
            for n in (0, 1)
        },
    )
    write(root, {f"train/{wnid}/{wnid}_boxes.txt": "" for wnid in ids})
    write(root, {f"val/images/val_{n}.JPEG": picture(100 + n) for n in range(3)})
    boxes = "0\t0\t62\t57"
    write(
        root,
        {
            "val/val_annotations.txt": "".join(
                f"val_{n}.JPEG\t{w}\t{boxes}\n" for n, w in ((2, "n01443537"), (0, "n02124075"))
            )
        },
    )
    return root


def test_tinyimagenet_folder_and_tar(tiny, make_recipe, tmp_path):
    for path in (
        tiny,
        tiny.parent,
        pack(tiny, tmp_path / "in.tar"),
        pack(tiny.parent, tmp_path / "above.tar"),
    ):
        splits = open_source(make_recipe(source="tinyimagenet", path=str(path)).data)
        train, val = splits["train"], splits["val"]
        assert (
            train.classes == ("goldfish", "Egyptian cat")
            and train.labels.tolist() == [0, 0, 1, 1]
            and train.fixed_size
        )
        assert [shade(train, index) for index in range(4)] == [10, 11, 0, 1]
        assert val.labels.tolist() == [0, 1] and [shade(val, index) for index in range(2)] == [
            102,
            100,
        ]


def test_wrong_tinyimagenet_is_refused(tiny, make_recipe):
    recipe = make_recipe(source="tinyimagenet", path=str(tiny))
    (tiny / "val/images/val_2.JPEG").unlink()
    refused(recipe, "val_annotations.txt line 1", "val_2.JPEG")
    (tiny / "val/val_annotations.txt").unlink()
    refused(recipe, "val_annotations.txt")
    shutil.rmtree(tiny / "train")
    refused(recipe, "not laid out as TinyImagenet")


# CSV


def test_csv_with_and_without_split(make_recipe, tmp_path):
    write(tmp_path, {f"images/{n}.png": picture(n) for n in range(20)})
    table = tmp_path / "table.csv"
    table.write_text(
        "label,path,split\ncat,images/3.png,train\n"
        + f"ant,{tmp_path}/images/4.png,val\nant,images/5.png,train\nx,y,test\n"
    )
    splits = open_source(make_recipe(source="csv", path=str(table)).data)
    assert splits["train"].classes == ("ant", "cat") and splits["train"].labels.tolist() == [1, 0]
    assert [shade(splits["train"], index) for index in range(2)] == [3, 5] and shade(
        splits["val"], 0
    ) == 4
    table.write_text("path,label\n" + "".join(f"images/{n}.png,{11 - n % 2}\n" for n in range(20)))
    splits = open_source(make_recipe(source="csv", path=str(table)).data)
    assert splits["train"].classes == ("10", "11") and len(splits["train"]) == 18
    # the tenth of each class
    assert [shade(splits["val"], index) for index in range(2)] == [18, 19]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,class\na,b\n", ["'file,class'", "path,label"]),
        ("", ["path,label"]),
        ("path,label\na.png\n", ["line 2", "missing"]),
        ("path,label,split\na.png,b,train\n", ["no images of split val"]),
        (b"path,label\n\xff\xfe\n", ["UTF-8"]),
    ],
)
def test_wrong_csv_is_refused(make_recipe, tmp_path, text, words):
    write(tmp_path, {"table.csv": text})
    refused(make_recipe(source="csv", path=str(tmp_path / "table.csv")), "table.csv", *words)


def test_missing_csv_is_refused(make_recipe, tmp_path):
    refused(make_recipe(source="csv", path=str(tmp_path / "none.csv")), "none.csv", "path,label")


# WebDataset


def shard(path, samples, *extra) -> None:
    """Samples are {ending: content} by key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for ending, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)


def numbered(numbers, label) -> dict:
    return {f"{n:04d}": {"png": picture(n), "cls": label(n).encode()} for n in numbers}


def test_webdataset_from_folder_glob_and_braces(make_recipe, tmp_path):
    for n in range(3):
        shard(
            tmp_path / f"set-train-{n:02d}.tar", numbered((2 * n, 2 * n + 1), lambda n: str(n % 3))
        )
    shard(tmp_path / "set-validation-00.tar", numbered((50, 51), lambda n: "2"))
    paths = [".", "set-*.tar", "set-{train-{00..02},validation-00}.tar"]
    for path in paths:
        splits = open_source(
            make_recipe(source="webdataset", path=str(tmp_path / path), workers=2).data
        )
        train = splits["train"]
        assert train.classes == ("0", "1", "2") and train.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert [shade(train, index) for index in range(6)] == list(range(6)) and shade(
            splits["val"], 1
        ) == 51
        assert splits["val"].labels.tolist() == [2, 2] and not train.fixed_size
    assert train.describe(2) == f"{tmp_path}/set-train-01.tar: 0002.png"
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    assert open_source(make_recipe(source="webdataset", path=str(tmp_path)).data)[
        "train"
    ].classes == ("ant", "bee", "cat")
    refused(
        make_recipe(
            source="webdataset", path=str(tmp_path / "set-{train-{00..03},validation-00}.tar")
        ),
        "no shard",
        "set-train-03.tar",
    )
    refused(make_recipe(source="webdataset", path=str(tmp_path / "set-{train")), "not a pattern")


def test_webdataset_with_json_labels_and_names(make_recipe, tmp_path):
    shard(
        tmp_path / "train/0.tar",
        {"a": {"png": picture(1), "json": b'{"label": "dog"}'}, "b": {"txt": b"no image"}},
    )
    shard(
        tmp_path / "val/0.tar",
        {"a": {"json": json.dumps({"cls": "cat", "x": 1}).encode(), "jpg": picture(2)}},
    )
    splits = open_source(make_recipe(source="webdataset", path=str(tmp_path)).data)
    assert (
        splits["train"].classes == ("cat", "dog")
        and splits["train"].labels.tolist() == [1]
        and splits["val"].labels.tolist() == [0]
    )


@pytest.mark.parametrize(
    "label",
    [
        b"",
        b"{",
        b"[1]",
        b'{"label": null}',
        b'{"label": -1}',
        b'{"label": 99999999999}',
        b"\xff",
        b"true",
    ],
)
def test_webdataset_with_wrong_labels_is_refused(make_recipe, tmp_path, label):
    shard(tmp_path / "train.tar", {"a": {"png": picture(1), "json": label}})
    shard(tmp_path / "val.tar", {"a": {"png": picture(1), "json": b'{"label": 0}'}})
    refused(
        make_recipe(source="webdataset", path=str(tmp_path)), "train.tar: a.json holds no label"
    )


@pytest.mark.parametrize("name", ["../a.png", "/a.png"])
def test_webdataset_with_a_dangerous_member_is_refused(make_recipe, tmp_path, name):
    shard(tmp_path / "train.tar", {"a": {"png": picture(1), "cls": b"0"}}, member(name))
    shard(tmp_path / "val.tar", {"a": {"png": picture(1), "cls": b"0"}})
    refused(make_recipe(source="webdataset", path=str(tmp_path)), name, "points outside")
    shard(
        tmp_path / "train.tar",
        {"a": {"png": picture(1), "cls": b"0"}},
        member("b.png", tarfile.SYMTYPE, "/etc/passwd"),
    )
    refused(make_recipe(source="webdataset", path=str(tmp_path)), "b.png", "is a link")


def test_webdataset_says_what_is_missing(make_recipe, tmp_path):
    recipe = make_recipe(source="webdataset", path=str(tmp_path))
    refused(recipe, "no .tar shards")
    shard(tmp_path / "part-0.tar", {"a": {"png": picture(1), "cls": b"0"}})
    refused(recipe, "part-0.tar", "train or val")
    (tmp_path / "part-0.tar").rename(tmp_path / "train-0.tar")
    refused(recipe, "split val hold no images")
    shard(tmp_path / "val-0.tar", {"a": {"png": picture(1)}})
    refused(recipe, "a.png has no label")
    shard(tmp_path / "val-0.tar", {"a": {"png": picture(1), "cls": b"cat"}})
    refused(recipe, "others are names")


# torchvision


def idx(array) -> bytes:
    """The file format of MNIST."""
    return (
        struct.pack(">HBB", 0, 8, array.ndim)
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def test_mnist_from_its_own_files(make_recipe, tmp_path):
    generator = np.random.default_rng(0)
    pixels = {
        prefix: generator.integers(0, 256, (5, 28, 28), np.uint8) for prefix in ("train", "t10k")
    }
    for prefix, images in pixels.items():
        labels = np.arange(5) + (prefix == "t10k")
        write(
            tmp_path / "MNIST/raw",
            {
                f"{prefix}-images-idx3-ubyte": idx(images),
                f"{prefix}-labels-idx1-ubyte": idx(labels),
            },
        )
    splits = open_source(
        make_recipe(source="torchvision.MNIST", path=str(tmp_path), image_size=32).data
    )
    assert splits["val"].labels.tolist() == [1, 2, 3, 4, 5] and splits["train"].fixed_size
    assert splits["train"].classes[:2] == ("0 - zero", "1 - one")
    assert np.array_equal(
        np.asarray(splits["val"].read(3)), np.repeat(pixels["t10k"][3][..., None], 3, 2)
    )


def test_food101_from_its_own_files(make_recipe, tmp_path):
    root = tmp_path / "food-101"
    lists = {
        "train": {"pizza": ["pizza/1"], "ramen": ["ramen/2"]},
        "test": {"pizza": ["pizza/3"], "ramen": []},
    }
    write(root, {f"meta/{split}.json": json.dumps(names) for split, names in lists.items()})
    write(
        root,
        {
            f"images/{name}.jpg": picture(int(name[-1]))
            for names in lists.values()
            for found in names.values()
            for name in found
        },
    )
    splits = open_source(make_recipe(source="torchvision.Food101", path=str(tmp_path)).data)
    assert (
        splits["train"].classes == ("pizza", "ramen")
        and splits["train"].labels.tolist() == [0, 1]
        and not splits["train"].fixed_size
    )
    assert shade(splits["val"], 0) == 3


def test_unsuitable_torchvision_sets_are_refused(make_recipe, tmp_path):
    refused(make_recipe(source="torchvision.Foo"), "no Foo", "Food101")
    refused(
        make_recipe(source="torchvision.FakeData", path=str(tmp_path)),
        "no division into train and val",
    )
    refused(
        make_recipe(source="torchvision.Food101", path=str(tmp_path)), "is incomplete", "data.path"
    )
