"""Sources: their contents, their refusals, and the conversion of images to upright 8-bit RGB."""

import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small_data import stored, write_images
from source_files import member, pack

from pipeline.data.sources import open_source
from pipeline.errors import UserError


def test_digits_split_is_fixed_and_stratified(make_recipe):
    first, second = (open_source(make_recipe(seed=seed).data) for seed in (0, 1))
    assert [len(first[split]) for split in ("train", "val")] == [1437, 360]
    for split in ("train", "val"):
        assert np.array_equal(first[split].labels, second[split].labels)
        share = np.bincount(first[split].labels) / len(first[split])
        assert np.ptp(share) < 0.02
    image = stored(first["val"], 0, make_recipe().data)
    assert image.shape == (16, 16, 3)
    assert image.dtype == np.uint8
    assert image.max() > 200
    assert first["val"].classes == tuple("0123456789")


def test_unknown_source_names_the_nearest(make_recipe):
    with pytest.raises(UserError, match="did you mean cifar10"):
        open_source(make_recipe(source="cifar01").data)


def test_folder_and_tar_hold_the_same(make_recipe, tmp_path):
    write_images(tmp_path / "source", train=2, val=1)
    (tmp_path / "source/train/cat/notes.txt").write_text("no image")
    (tmp_path / "source/train/cat/._0.png").write_text("debris of another system")
    tar = pack(tmp_path / "source", tmp_path / "source.tar")
    folder, archive = (
        open_source(make_recipe(source="imagefolder", path=str(p)).data)
        for p in (tmp_path / "source", tar)
    )
    assert folder["train"].classes == ("cat", "dog")
    assert folder["train"].labels.tolist() == [
        0,
        0,
        1,
        1,
    ]
    archive = pickle.loads(pickle.dumps(archive))
    for split in ("train", "val"):
        assert np.array_equal(folder[split].labels, archive[split].labels)
        for index in range(len(folder[split])):
            assert np.array_equal(folder[split].read(index), archive[split].read(index))
    assert archive["val"].describe(0) == f"{tar}: val/cat/0.png"


def test_stored_size_of_large_long_and_small_images(make_recipe, tmp_path):
    write_images(tmp_path, train=2, val=1)
    for name, size in {"0": (400, 300), "1": (1000, 100)}.items():
        Image.new("RGB", size).save(tmp_path / f"train/cat/{name}.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "train/dog/0.png")
    data = make_recipe(source="imagefolder", path=str(tmp_path), image_size=56).data
    shapes = [stored(open_source(data)["train"], index, data).shape for index in range(3)]
    # The shorter side is 64 = 56 * 256 / 224, the aspect at most 2, and nothing is enlarged.
    assert shapes == [(64, 85, 3), (64, 128, 3), (10, 20, 3)]
    data = replace(data, max_resolution=100)
    shapes = [stored(open_source(data)["train"], index, data).shape for index in range(3)]
    # The longer side is 100, and nothing is cropped.
    assert shapes == [(75, 100, 3), (10, 100, 3), (10, 20, 3)]


def test_max_resolution_is_refused_where_it_would_do_nothing(make_recipe):
    with pytest.raises(UserError, match=r"digits is stored at data\.image_size; remove it"):
        open_source(make_recipe(max_resolution=100).data)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (member("../evil.png"), "points outside"),
        (member("/train/cat/evil.png"), "points outside"),
        (member("train/cat/evil.png", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (member("train/cat/evil.png", tarfile.LNKTYPE, "train/cat/0.png"), "is a link"),
        (member("train/cat/evil.png", tarfile.CHRTYPE), "is a link, a device"),
    ],
)
def test_tar_with_dangerous_member_is_refused(make_recipe, tmp_path, extra, message):
    write_images(tmp_path / "source", train=1, val=1)
    tar = pack(tmp_path / "source", tmp_path / "source.tar", extra)
    with pytest.raises(UserError, match=message) as error:
        open_source(make_recipe(source="imagefolder", path=str(tar)).data)
    assert "\n" not in str(error.value)
    assert extra.name in str(error.value)


def test_truncated_or_compressed_tar_is_refused(make_recipe, tmp_path):
    write_images(tmp_path / "source", train=1, val=1)
    tar = pack(tmp_path / "source", tmp_path / "source.tar")
    recipe = make_recipe(source="imagefolder", path=str(tar))
    content = tar.read_bytes()
    with tarfile.open(tar) as archive:
        last = archive.getmembers()[-1]
    # Cut before a member, which tarfile does not notice, and within a member.
    for cut in (last.offset, last.offset_data + 1):
        tar.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"cut off|cannot be read"):
            open_source(recipe.data)
    with tarfile.open(tar, "w:gz") as archive:
        archive.add(tmp_path / "source", ".")
    with pytest.raises(UserError, match="uncompressed"):
        open_source(recipe.data)


def test_wrong_layouts_are_refused(make_recipe, tmp_path):
    with pytest.raises(UserError, match="not set"):
        open_source(make_recipe(source="imagefolder").data)
    with pytest.raises(UserError, match="no such file"):
        open_source(make_recipe(source="imagefolder", path=str(tmp_path / "nowhere")).data)
    write_images(tmp_path / "source", train=1)
    recipe = make_recipe(source="imagefolder", path=str(tmp_path / "source"))
    with pytest.raises(UserError, match="no images in val/<class>/"):
        open_source(recipe.data)
    write_images(tmp_path / "source", val=1)
    (tmp_path / "source/val/dog").rename(tmp_path / "source/val/wolf")
    with pytest.raises(UserError, match="class wolf is in val/ but not in train/"):
        open_source(recipe.data)


def test_every_kind_of_image_becomes_upright_rgb(make_recipe, tmp_path):
    write_images(tmp_path, train=1, val=1)
    ramp = np.linspace(0, 1, 40 * 60).reshape(40, 60)
    grey = Image.fromarray((ramp * 255).astype(np.uint8))
    colour = Image.merge(
        "RGB", [grey, grey.point(lambda v: 255 - v), Image.new("L", grey.size, 60)]
    )
    exif = Image.Exif()
    # Orientation 6: shown after a quarter turn clockwise.
    exif[0x0112] = 6
    target = tmp_path / "train/cat"
    grey.save(target / "1_grey.png")
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(target / "2_grey16.png")
    colour.convert("CMYK").save(target / "3_cmyk.tif")
    colour.convert("RGBA").save(target / "4_rgba.png")
    colour.quantize(256).save(target / "5_palette.gif")
    colour.save(target / "6_turned.png", exif=exif)
    split = open_source(make_recipe(source="imagefolder", path=str(tmp_path), image_size=64).data)[
        "train"
    ]
    wanted = (
        [np.repeat(np.asarray(grey)[..., None], 3, 2)] * 2
        + [np.asarray(colour)] * 3
        + [np.rot90(np.asarray(colour), -1)]
    )
    for index, expected in enumerate(wanted, start=1):
        image = np.asarray(split.read(index))
        name = split.describe(index)
        assert image.shape == expected.shape, name
        assert image.dtype == np.uint8, name
        assert split.labels[index] == 0, name
        tolerance = 12 if "palette" in name else 1
        assert np.abs(image.astype(int) - expected).max() <= tolerance, name
