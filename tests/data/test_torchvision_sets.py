"""Data sets of torchvision, from real files of their layouts."""

import json
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from source_files import picture, refused, shade, write

from pipeline.data.sources import open_source
from pipeline.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


def idx(array) -> bytes:
    """Encode an array in the file format of MNIST."""
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
    assert splits["val"].labels.tolist() == [1, 2, 3, 4, 5]
    assert splits["train"].fixed_size
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
    assert splits["train"].classes == ("pizza", "ramen")
    assert splits["train"].labels.tolist() == [0, 1]
    assert not splits["train"].fixed_size
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


def test_failed_cifar10_download_tells_the_remedy(make_recipe, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match=r"set data\.path") as error:
        open_source(make_recipe(source="cifar10").data)
    assert "\n" not in str(error.value)


def test_cifar10_from_torchvisions_folder(make_recipe, tmp_path, monkeypatch):
    """A small archive is read by torchvision; its checksums replace the published ones."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8)
    batches = tmp_path / "build" / CIFAR10.base_folder
    batches.mkdir(parents=True)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list):
        (batches / name).write_bytes(
            pickle.dumps({"data": pixels.reshape(5, -1), "labels": [0, 1, 2, 3, 4]})
        )
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    archive = tmp_path / "download" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, CIFAR10.base_folder)
    recipe = make_recipe(source="cifar10", path=str(archive.parent), image_size=32)
    with pytest.raises(UserError, match="damaged"):
        open_source(recipe.data)
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(
            CIFAR10,
            attribute,
            [[name, calculate_md5(batches / name)] for name, _ in getattr(CIFAR10, attribute)],
        )
    monkeypatch.setattr(
        CIFAR10, "meta", {**CIFAR10.meta, "md5": calculate_md5(batches / "batches.meta")}
    )
    monkeypatch.setattr(CIFAR10, "tgz_md5", calculate_md5(archive))
    splits = open_source(recipe.data)
    assert [len(splits[name]) for name in ("train", "val")] == [25, 5]
    assert np.array_equal(splits["val"].read(3), pixels[3].transpose(1, 2, 0))
    assert splits["val"].labels[3] == 3


@pytest.mark.skipif(
    not (SHARED / "cifar10.tar").is_file(), reason="needs ../shared/data/cifar10.tar"
)
def test_cifar10_tar(make_recipe):
    splits = open_source(
        make_recipe(source="cifar10", path=str(SHARED / "cifar10.tar"), image_size=32).data
    )
    assert [len(splits[split]) for split in ("train", "val")] == [50_000, 10_000]
    assert len(splits["train"].classes) == 10
    assert splits["train"].classes[:2] == (
        "airplane",
        "automobile",
    )
    assert set(np.bincount(splits["train"].labels)) == {5000}
    assert set(np.bincount(splits["val"].labels)) == {1000}
    for index in (0, 9_999, 5_001):
        image = np.asarray(splits["val"].read(index))
        assert image.shape == (32, 32, 3)
        assert splits["val"].labels[index] == index // 1000
        assert image.std() > 5
