"""ImageNet by WordNet id, TinyImagenet and CSV, from real files of their layouts."""

import shutil

import pytest
from source_files import pack, picture, refused, shade, write

from pipeline.data.sources import open_source
from pipeline.data.sources.folders import wordnet_names
from pipeline.errors import UserError


def wnids():
    from timm.data import ImageNetInfo

    return ImageNetInfo().label_names()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Make a folder with a training image of each of the 1,000 classes and two images of val."""
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
    assert train.labels.tolist() == list(range(1000))
    assert all(shade(train, index) == index % 256 for index in (0, 99, 999))
    assert val.labels.tolist() == [7, 150]
    assert shade(val, 1) == 150
    # From the challenge's list, https://image-net.org/challenges/LSVRC/2012/browse-synsets.
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
    # The bird and the machine.
    assert train.classes[134] == "crane (n02012849)"
    assert train.classes[517] == "crane (n03126707)"


def test_imagenet100_is_the_first_hundred_classes(imagenet, make_recipe):
    splits = open_source(make_recipe(source="imagenet100", path=str(imagenet)).data)
    assert splits["train"].labels.tolist() == list(range(100))
    assert splits["train"].classes == wordnet_names(wnids())[:100]
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
        assert train.classes == ("goldfish", "Egyptian cat")
        assert train.labels.tolist() == [0, 0, 1, 1]
        assert train.fixed_size
        assert [shade(train, index) for index in range(4)] == [10, 11, 0, 1]
        assert val.labels.tolist() == [0, 1]
        assert [shade(val, index) for index in range(2)] == [
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


def test_csv_with_and_without_split(make_recipe, tmp_path):
    write(tmp_path, {f"images/{n}.png": picture(n) for n in range(20)})
    table = tmp_path / "table.csv"
    table.write_text(
        "label,path,split\ncat,images/3.png,train\n"
        + f"ant,{tmp_path}/images/4.png,val\nant,images/5.png,train\nx,y,test\n"
    )
    splits = open_source(make_recipe(source="csv", path=str(table)).data)
    assert splits["train"].classes == ("ant", "cat")
    assert splits["train"].labels.tolist() == [1, 0]
    assert [shade(splits["train"], index) for index in range(2)] == [3, 5]
    assert shade(splits["val"], 0) == 4
    table.write_text("path,label\n" + "".join(f"images/{n}.png,{11 - n % 2}\n" for n in range(20)))
    splits = open_source(make_recipe(source="csv", path=str(table)).data)
    assert splits["train"].classes == ("10", "11")
    assert len(splits["train"]) == 18
    # The tenth image of each class.
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
