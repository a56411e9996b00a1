"""Sources: what they hold, what they refuse, and that every kind of image becomes upright 8-bit
RGB.
"""

import io
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import stored, write_images

from pipeline.data.sources import open_source
from pipeline.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


def pack(folder: Path, tar: Path, *extra: tarfile.TarInfo) -> Path:
    """Tar the contents of ``folder`` as `tar -C folder -cf tar .` does, then add ``extra`` headers."""
    with tarfile.open(tar, "w") as archive:
        archive.add(folder, ".")
        for member in extra:
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return tar


def test_digits_split_is_fixed_and_stratified(make_recipe):
    first, second = (open_source(make_recipe(seed=seed).data) for seed in (0, 1))
    assert [len(first[split]) for split in ("train", "val")] == [1437, 360]
    for split in ("train", "val"):
        assert np.array_equal(first[split].labels, second[split].labels)
        share = np.bincount(first[split].labels) / len(first[split])
        assert np.ptp(share) < 0.02
    image = stored(first["val"], 0, make_recipe().data)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8 and image.max() > 200
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
    assert folder["train"].classes == ("cat", "dog") and folder["train"].labels.tolist() == [
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
    # shorter side 64 = 56 * 256 / 224, aspect at most 2, never enlarged
    assert shapes == [(64, 85, 3), (64, 128, 3), (10, 20, 3)]
    data = replace(data, max_resolution=100)
    shapes = [stored(open_source(data)["train"], index, data).shape for index in range(3)]
    # longer side 100, nothing cropped
    assert shapes == [(75, 100, 3), (10, 100, 3), (10, 20, 3)]


def test_max_resolution_is_refused_where_it_would_do_nothing(make_recipe):
    with pytest.raises(UserError, match="digits is stored at data.image_size; remove it"):
        open_source(make_recipe(max_resolution=100).data)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


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
    assert "\n" not in str(error.value) and extra.name in str(error.value)


def test_truncated_or_compressed_tar_is_refused(make_recipe, tmp_path):
    write_images(tmp_path / "source", train=1, val=1)
    tar = pack(tmp_path / "source", tmp_path / "source.tar")
    recipe = make_recipe(source="imagefolder", path=str(tar))
    content = tar.read_bytes()
    with tarfile.open(tar) as archive:
        last = archive.getmembers()[-1]
    # where nothing tells tarfile that something is missing, and within a member
    for cut in (last.offset, last.offset_data + 1):
        tar.write_bytes(content[:cut])
        with pytest.raises(UserError, match="cut off|cannot be read"):
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
    # shown after a quarter turn clockwise
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
        assert (
            image.shape == expected.shape and image.dtype == np.uint8 and split.labels[index] == 0
        ), split.describe(index)
        tolerance = 12 if "palette" in split.describe(index) else 1
        assert np.abs(image.astype(int) - expected).max() <= tolerance, split.describe(index)


def test_failed_cifar10_download_tells_the_remedy(make_recipe, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match="set data.path") as error:
        open_source(make_recipe(source="cifar10").data)
    assert "\n" not in str(error.value)


def test_cifar10_from_torchvisions_folder(make_recipe, tmp_path, monkeypatch):
    """The real reader on a small archive; only the published checksums are replaced by the
    archive's own.
    """
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
    assert (
        np.array_equal(splits["val"].read(3), pixels[3].transpose(1, 2, 0))
        and splits["val"].labels[3] == 3
    )


@pytest.mark.skipif(
    not (SHARED / "cifar10.tar").is_file(), reason="needs ../shared/data/cifar10.tar"
)
def test_cifar10_tar(make_recipe):
    splits = open_source(
        make_recipe(source="cifar10", path=str(SHARED / "cifar10.tar"), image_size=32).data
    )
    assert [len(splits[split]) for split in ("train", "val")] == [50_000, 10_000]
    assert len(splits["train"].classes) == 10 and splits["train"].classes[:2] == (
        "airplane",
        "automobile",
    )
    assert set(np.bincount(splits["train"].labels)) == {5000} and set(
        np.bincount(splits["val"].labels)
    ) == {1000}
    for index in (0, 9_999, 5_001):
        image = np.asarray(splits["val"].read(index))
        assert (
            image.shape == (32, 32, 3)
            and splits["val"].labels[index] == index // 1000
            and image.std() > 5
        )
