"""WebDataset shards, from real tar files."""

import io
import json
import tarfile

import pytest
from source_files import member, picture, refused, shade

from pipeline.data.sources import open_source


def shard(path, samples, *extra) -> None:
    """Write a shard of samples: key -> {ending: content}."""
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
        assert train.classes == ("0", "1", "2")
        assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert [shade(train, index) for index in range(6)] == list(range(6))
        assert shade(splits["val"], 1) == 51
        assert splits["val"].labels.tolist() == [2, 2]
        assert not train.fixed_size
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
    assert splits["train"].classes == ("cat", "dog")
    assert splits["train"].labels.tolist() == [1]
    assert splits["val"].labels.tolist() == [0]


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
