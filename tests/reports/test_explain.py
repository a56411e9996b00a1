"""``coda explain`` on real files, some of them broken, and the mistakes of a user."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from recipes_for_tests import small_recipe
from sklearn.datasets import load_digits

from pipeline.cli import main
from pipeline.export import export
from pipeline.models.create import build_model
from pipeline.reports.explain import Explainer
from pipeline.run_folder import RunFolder

NAMES = ["zero", "<b>one</b>", *(f"class {c}" for c in range(2, 10))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "export"
    recipe = small_recipe(
        folder, model__name="coda_resnet20", model__args={"conv_stages": 1, "rank": 2}
    )
    torch.manual_seed(0)
    export(build_model(recipe.model, 10), recipe, NAMES, folder)
    return folder


def digit(index, size=8):
    pixels = np.round(load_digits().images[index] * 255 / 16).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def test_a_folder_with_a_broken_image(exported, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    digit(3).save(folder / "<i>a&b.png")
    digit(4, 40).save(folder / "z.jpg")
    (folder / "broken.png").write_bytes((folder / "<i>a&b.png").read_bytes()[:50])
    (folder / "notes.txt").write_text("no image")
    assert (
        main(
            [
                "explain",
                str(exported),
                str(folder),
                "--top-k",
                "2",
                "--layers",
                "--output",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "out" / "index.html")
    assert "left out" in captured.err
    assert "broken.png" in captured.err
    assert "notes.txt" not in captured.err
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<section>") == 2
    assert page.count("data:image/png;base64,") == 4
    assert "&lt;i&gt;a&amp;b.png" in page
    assert "<i>" not in page
    assert "<b>" not in page
    assert "broken.png" in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_video(exported, tmp_path):
    path = tmp_path / "moving.avi"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for index in range(6):
        video.write(np.asarray(digit(index, 64)))
    video.release()
    assert (
        main(
            [
                "explain",
                str(exported),
                str(path),
                "--class",
                "<b>one</b>",
                "--output",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    with Image.open(tmp_path / "out" / "video.gif") as moving:
        assert moving.n_frames == 6
        assert moving.size[0] == 2 * moving.size[1]
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/gif") == 1
    assert page.count("data:image/png") == 4
    assert "&lt;b&gt;one" in page


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("none.png", None, [], ["none.png", "no such"]),
        ("broken.png", b"\x89PNG", [], ["broken.png", "cannot be read as an image"]),
        ("broken.mp4", b"nothing", [], ["broken.mp4", "cannot be read as a video"]),
        ("folder/notes.txt", b"text", [], ["folder", "holds no images"]),
        ("good.png", "digit", ["--class", "zer"], ["--class zer", "zero"]),
        ("good.png", "digit", ["--class", "10"], ["--class 10", "below 10"]),
        ("good.png", "digit", ["--top-k", "11"], ["--top-k", "10 classes"]),
    ],
)
def test_mistakes_end_in_one_line(exported, tmp_path, capfd, name, content, options, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content == "digit":
        digit(0).save(path)
    elif content is not None:
        path.write_bytes(content)
    source = path.parent if "/" in name else path
    assert (
        main(["explain", str(exported), str(source), "--output", str(tmp_path / "out"), *options])
        == 2
    )
    last = capfd.readouterr().err.strip().split("\n")[-1].split("\r")[-1]
    assert last.startswith("coda: "), last
    assert all(word in last for word in words), last
    assert not (tmp_path / "out").exists()


def test_the_model_sees_what_evaluation_shows(exported):
    """The stored pixels where they fit, else the central square less the margin."""
    explainer = Explainer(RunFolder(exported))
    small = explainer.view(digit(5))
    assert small.shape == (3, 8, 8)
    assert torch.equal(
        (small * 255).round().byte()[0], torch.from_numpy(np.array(digit(5)))[..., 0]
    )
    large = np.zeros((64, 100, 3), np.uint8)
    # These are the central 56 x 56 pixels, 7/8 of 64.
    large[4:60, 22:78] = 200
    assert explainer.view(Image.fromarray(large)).min() > 0.77
    large[3:61, 21:79] = 0
    assert explainer.view(Image.fromarray(large)).max() == 0
