"""The command `coda verify`: whole files pass, and any damaged byte is a mistake (exit code 2)."""

import json

import numpy as np
import pytest
import yaml
from ffcv.reader import Reader
from small_data import recipe, write_images

from pipeline.cli import main
from pipeline.data.beton import measure
from pipeline.data.manifest import open_manifest
from pipeline.data.prepare import prepare


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    write_images(folder / "source", train=12, val=4)
    made = recipe(
        folder / "data",
        source="imagefolder",
        path=str(folder / "source"),
        image_size=48,
        write_mode="jpg",
        workers=2,
    )
    prepare(made)
    return made


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy of the prepared folder that the test may damage."""
    for path in pristine.data.folder.glob("[!.]*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refused(capsys, arguments, *words) -> None:
    assert main(["verify", *map(str, arguments)]) == 2
    last = capsys.readouterr().err.strip().split("\n")[-1].split("\r")[-1]
    assert last.startswith("coda: ")
    for word in words:
        assert word in last, last


def test_a_whole_folder_passes_by_folder_and_by_recipe(pristine, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(pristine.to_dict()))
    for arguments in ([pristine.data.folder], [path], [path, "data.workers=1"]):
        assert main(["verify", *map(str, arguments)]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == 2
        assert "train.beton: 24 images of 2 classes" in shown[0]
        assert "val.beton: 8 images" in shown[1]
        assert open_manifest(pristine.data.folder).splits["train"].xxh128 in shown[0]
    refused(capsys, [path, "data.jpeg_quality=50"], "data.jpeg_quality 90 (recipe: 50)")


def test_every_kind_of_damaged_byte_is_found(folder, capsys):
    path = folder / "train.beton"
    content = path.read_bytes()
    images = Reader(str(path)).metadata["f0"]
    first = int(images["data_ptr"][0])
    header, table, gap, image, padding, addresses = (
        9,
        2200,
        first - 1,
        first + 700,
        len(content) - 1000,
        len(content) - 1,
    )
    for place in (header, table, gap, image, padding, addresses):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        refused(capsys, [folder], "train.beton", "coda prepare")
    path.write_bytes(content)
    assert main(["verify", str(folder)]) == 0


def test_damage_that_the_manifest_does_not_know_is_found_by_decoding(folder, capsys):
    """Files that an earlier version prepared have no hash of the whole file."""
    path, manifest = folder / "val.beton", folder / "manifest.json"
    tree = json.loads(manifest.read_text())
    for split in tree["splits"].values():
        del split["xxh128"], split["skipped"]
    for key in ("max_resolution", "jpeg_quality", "compress_probability"):
        del tree[key]
    manifest.write_text(json.dumps(tree))
    assert main(["verify", str(folder)]) == 0
    assert "no hash" in capsys.readouterr().out
    begin = int(Reader(str(path)).metadata["f0"]["data_ptr"][3])
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(bytes(100))
    refused(capsys, [folder], "val.beton: image 3 cannot be decoded")


def test_counts_must_be_those_of_the_manifest(folder, capsys):
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("12,\n    12", "11,\n    13", 1))
    refused(capsys, [folder], "images per class")


def test_a_folder_that_is_not_a_prepared_one_is_refused(tmp_path, capsys):
    refused(capsys, [tmp_path], "manifest.json", "coda prepare")
    refused(capsys, [tmp_path / "none.yaml"], "none.yaml")


@pytest.mark.parametrize(("write_mode", "share"), [("raw", 0.0), ("jpg", 1.0), ("proportion", 0.5)])
def test_write_modes_and_quality(tmp_path, write_mode, share):
    """FFCV's reader finds the modes and sizes, and a lower quality takes fewer bytes."""
    write_images(tmp_path / "source", train=20, val=1)
    sizes = []
    for quality in (90, 30):
        settings = {
            "source": "imagefolder",
            "path": str(tmp_path / "source"),
            "image_size": 224,
            "max_resolution": 64,
        }
        made = recipe(
            tmp_path / f"{write_mode}-{quality}",
            **settings,
            write_mode=write_mode,
            jpeg_quality=quality,
        )
        prepare(made)
        path = made.data.folder / "train.beton"
        reader = Reader(str(path))
        images, labels = reader.metadata["f0"], reader.metadata["f1"].reshape(-1)
        assert np.maximum(images["height"], images["width"]).max() == 64
        assert labels.tolist() == [0] * 20 + [1] * 20
        as_jpg = images["mode"] == 0
        assert as_jpg.mean() == share if share in (0, 1) else 0.25 < as_jpg.mean() < 0.75
        pages = (
            reader.alloc_table["ptr"] // reader.page_size,
            (reader.alloc_table["ptr"] + reader.alloc_table["size"] - 1) // reader.page_size,
        )
        # Every image lies within one page.
        assert np.array_equal(*pages)
        assert measure(path)[1] == 40
        sizes.append(reader.alloc_table["size"][as_jpg].sum())
    assert sizes[1] < sizes[0] or share == 0
