"""Images of every kind: converted, or refused with the reason, and never waited for."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFile
from small_data import write_images

from pipeline.data.images import FORMATS, decode, is_image, read_file
from pipeline.data.manifest import open_manifest
from pipeline.data.prepare import prepare
from pipeline.errors import UserError

RAMP = np.linspace(0, 1, 40 * 60).reshape(40, 60)
GREY = Image.fromarray((RAMP * 255).astype(np.uint8))
COLOUR = Image.merge(
    "RGB", [GREY, GREY.point(lambda value: 255 - value), Image.new("L", GREY.size, 60)]
)


def encoded(image, format, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    # Orientation 6: shown after a quarter turn clockwise.
    exif[0x0112] = 6
    return encoded(COLOUR, "JPEG", exif=exif, quality=95)


as_rgb = np.asarray(COLOUR).astype(int)
as_grey = np.repeat(np.asarray(GREY)[..., None], 3, 2).astype(int)


@pytest.mark.parametrize(
    ("content", "expected", "tolerance"),
    [
        pytest.param(encoded(COLOUR, "JPEG", quality=95), as_rgb, 12, id="jpeg"),
        pytest.param(
            encoded(COLOUR, "JPEG", quality=95, progressive=True), as_rgb, 12, id="progressive"
        ),
        pytest.param(encoded(GREY, "JPEG", quality=95), as_grey, 6, id="grey jpeg"),
        pytest.param(
            encoded(COLOUR.convert("CMYK"), "JPEG", quality=95), as_rgb, 12, id="cmyk jpeg"
        ),
        pytest.param(turned(), np.rot90(as_rgb, -1), 12, id="turned jpeg"),
        pytest.param(encoded(GREY, "PNG"), as_grey, 0, id="grey"),
        pytest.param(
            encoded(GREY.convert("1"), "PNG"),
            np.repeat(np.asarray(GREY.convert("1"))[..., None], 3, 2) * 255,
            0,
            id="1 bit",
        ),
        pytest.param(encoded(GREY.convert("LA"), "PNG"), as_grey, 0, id="grey with alpha"),
        pytest.param(
            encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
            as_grey,
            1,
            id="16 bit",
        ),
        pytest.param(
            encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "TIFF"),
            as_grey,
            1,
            id="16 bit tiff",
        ),
        pytest.param(
            encoded(Image.fromarray((RAMP * 65535).astype(np.int32)), "TIFF"),
            as_grey,
            1,
            id="32 bit tiff",
        ),
        pytest.param(encoded(COLOUR.convert("CMYK"), "TIFF"), as_rgb, 1, id="cmyk tiff"),
        pytest.param(encoded(COLOUR.convert("RGBA"), "PNG"), as_rgb, 0, id="rgba"),
        pytest.param(encoded(COLOUR.quantize(256), "GIF"), as_rgb, 12, id="palette"),
        pytest.param(encoded(COLOUR, "WEBP", lossless=True), as_rgb, 0, id="webp"),
        pytest.param(encoded(COLOUR, "PPM"), as_rgb, 0, id="ppm"),
        pytest.param(encoded(COLOUR, "BMP"), as_rgb, 0, id="bmp"),
    ],
)
def test_converted_to_upright_rgb(content, expected, tolerance):
    image = decode(content)
    assert image.mode == "RGB"
    assert image.size == expected.shape[1::-1]
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= tolerance


def bomb(side: int) -> bytes:
    """Return a PNG of side x side white pixels with one bit each."""
    return encoded(Image.new("1", (side, side), 1), "PNG")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"no image", "not an image", id="text"),
        pytest.param(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image", id="postscript"
        ),
        pytest.param(encoded(COLOUR, "PNG")[:200], "truncated", id="cut png"),
        pytest.param(encoded(COLOUR, "JPEG")[:400], "Truncated", id="cut jpeg"),
        pytest.param(
            encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "floating-point", id="float"
        ),
        pytest.param(bomb(9_500), "exceeds limit", id="90 million pixels"),
        pytest.param(bomb(14_000), "exceeds limit", id="196 million pixels"),
    ],
)
def test_refused_with_the_reason(content, words):
    with pytest.raises(Exception, match=words):
        decode(content)


def test_a_large_image_below_the_limit_is_read():
    assert decode(bomb(5_000)).size == (5_000, 5_000)


def test_damaged_exif_data_say_nothing():
    content = encoded(COLOUR, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(40))
    assert decode(content).size == COLOUR.size


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", 1 << 40)
    for name, reason in {
        "pipe": "is not a regular file",
        "folder": "Is a directory",
        "loop": "Too many levels of symbolic links",
        "sparse": "more than the",
        "none": "No such file",
    }.items():
        with pytest.raises(OSError, match=reason):
            read_file(tmp_path / f"{name}.png")


def test_names_of_images():
    assert [is_image(name) for name in ("a/b.JPEG", "b.jpg", "c.png", "d.webp", "e.tif")] == [
        True
    ] * 5
    assert [is_image(name) for name in ("a/._b.png", "b.txt", "c.eps", "d", "png", "e.png/f")] == [
        False
    ] * 6
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert "EPS" not in FORMATS


@pytest.fixture
def faulty_folder(tmp_path):
    """Write 12 + 2 images; the 6 training images of class cat are broken, each in another way."""
    root = tmp_path / "source"
    write_images(root, train=6, val=1)
    cat = root / "train/cat"
    for path in cat.iterdir():
        path.unlink()
    (cat / "0.png").touch()
    (cat / "1.png").write_text("not an image")
    os.mkfifo(cat / "2.png")
    (cat / "3.png").symlink_to("nowhere.png")
    (cat / "4.png").write_bytes(bomb(14_000))
    (cat / "5.png").write_bytes(encoded(COLOUR, "PNG")[:200])
    return root


@pytest.mark.timeout(60)
def test_skipped_images_are_listed(faulty_folder, make_recipe, caplog):
    recipe = make_recipe(source="imagefolder", path=str(faulty_folder), broken_images="skip")
    prepare(recipe)
    train = open_manifest(recipe.data.folder).splits["train"]
    assert train.samples == 6
    assert train.class_counts == (0, 6)
    assert [where for where, _ in train.skipped] == [
        str(faulty_folder / f"train/cat/{number}.png") for number in range(6)
    ]
    reasons = (
        "empty",
        "not an image",
        "not a regular file",
        "No such file",
        "exceeds limit",
        "truncated",
    )
    printed = caplog.text
    for (where, found), expected in zip(train.skipped, reasons, strict=True):
        assert expected in found
        assert f"{where}: {found}" in printed


@pytest.mark.timeout(60)
def test_nothing_but_broken_images_is_refused(faulty_folder, make_recipe):
    shutil.rmtree(faulty_folder / "train/dog")
    shutil.rmtree(faulty_folder / "val/dog")
    with pytest.raises(UserError, match="no other image of train"):
        prepare(make_recipe(source="imagefolder", path=str(faulty_folder), broken_images="skip"))
