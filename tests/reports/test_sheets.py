"""Pictures show what they should, pixel by pixel where that matters, and are never half-written."""

import resource
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from sklearn.datasets import load_digits

from pipeline.errors import UserError
from pipeline.evaluation.plots import depth_curves
from pipeline.reports.sheets import BACKGROUND, colour_rendering, contribution_sheet

CURVES = {
    "resnet20": [(1.0, 0.1), (0.05, 0.9)],
    "coda_resnet20": [(0.0, 0.5), (0.2, 0.7), (1.0, 0.1)],
}


def digits() -> torch.Tensor:
    return torch.tensor(load_digits().images[:2] / 16, dtype=torch.float32)[:, None].repeat(
        1, 3, 1, 1
    )


def shown_figure(monkeypatch: pytest.MonkeyPatch, draw) -> Figure:
    """The figure that ``draw`` saves."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *args, **options: (saved.append(figure), save(figure, *args, **options)),
    )
    draw()
    return saved[0]


def test_sheet_shows_images_and_maps_on_a_symmetric_scale(tmp_path, monkeypatch):
    images, encoded = digits(), torch.cat([digits(), 1 - digits()], 1)
    signed = torch.zeros(2, 4, 4)
    signed[0, 0, 0], signed[0, 1, 1], signed[1, 2, 2] = 8.0, -4.0, 1e-6
    path = tmp_path / "new" / "sheet.png"
    figure = shown_figure(
        monkeypatch,
        lambda: contribution_sheet(
            images, [signed, encoded], ["stage 3", "input"], path, row_titles=["class 0", "class 1"]
        ),
    )
    assert imread(path).std() > 0.05
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]
    axes = figure.axes[:6]
    assert [axis.get_title() for axis in axes[:3]] == ["image", "stage 3", "input"]
    assert [axes[0].get_ylabel(), axes[3].get_ylabel()] == ["class 0", "class 1"]
    picture = axes[1].images[0]
    drawn = picture.get_array()
    assert (picture.norm.vmin, picture.norm.vmax) == (-1, 1)
    assert drawn[0, 0] == 1
    assert -1 < drawn[1, 1] < -0.4
    assert drawn[2, 2] == 0
    # Each map has its own scale.
    assert axes[4].images[0].get_array()[2, 2] == 1
    blue, white, red = (picture.cmap(picture.norm(value))[:3] for value in (-1, 0, 1))
    assert blue[2] > blue[0]
    assert min(white) > 0.95
    assert red[0] > red[2]


def test_sheet_without_contributions_at_all(tmp_path):
    contribution_sheet(
        digits(),
        [torch.zeros(2, 8, 8), torch.zeros(2, 6, 8, 8)],
        ["map", "colour"],
        tmp_path / "zero.png",
    )
    assert (tmp_path / "zero.png").stat().st_size > 1000


def test_colour_rendering_shows_what_contributes():
    contributions = torch.zeros(6, 2, 2)
    # Red.
    contributions[:, 0, 0] = torch.tensor([1.0, 0, 0, 0, 1, 1])
    # Black.
    contributions[:, 0, 1] = torch.tensor([0.0, 0, 0, 1, 1, 1])
    # Against the class, in sum.
    contributions[:, 1, 0] = torch.tensor([1.0, 1, 1, -4, 0, 0])
    picture = colour_rendering(contributions)
    assert picture.shape == (3, 2, 2)
    assert picture[:, 0, 0].tolist() == [1, 0, 0]
    assert picture[:, 0, 1].tolist() == [0, 0, 0]
    assert picture[:, 1, 0].tolist() == picture[:, 1, 1].tolist() == [BACKGROUND] * 3


def test_strength_is_opacity():
    contributions = torch.zeros(6, 1, 2)
    contributions[0, 0] = torch.tensor([2.0, 1.0])
    strong, weak = colour_rendering(contributions)[0, 0].tolist()
    assert strong == 1
    assert BACKGROUND < weak < strong


def test_depth_curves_show_points_threshold_and_chance(tmp_path, monkeypatch):
    figure = shown_figure(
        monkeypatch, lambda: depth_curves(CURVES, 1 / 9, tmp_path / "depth.png", threshold=0.6)
    )
    axis = figure.axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines) == ["resnet20", "coda_resnet20", "threshold 0.6", "chance 0.111"]
    assert lines["resnet20"].get_xydata().tolist() == [[0.05, 0.9], [1.0, 0.1]]
    assert lines["chance 0.111"].get_ydata()[0] == 1 / 9
    assert lines["resnet20"].get_color() != lines["coda_resnet20"].get_color()
    assert lines["resnet20"].get_marker() != lines["coda_resnet20"].get_marker()
    assert "distance" in axis.get_xlabel()
    assert "localisation" in axis.get_ylabel()
    assert len(axis.get_legend().get_texts()) == 4


def test_full_disk_leaves_the_old_picture(tmp_path):
    path = tmp_path / "depth.png"
    depth_curves(CURVES, 1 / 9, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    # The picture needs more bytes than this.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"cannot write the picture .*depth\.png: File too large"
        ):
            depth_curves(CURVES, 1 / 9, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_bad_paths_are_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "depth.png", tmp_path / "folder"):
        with pytest.raises(UserError, match="cannot write the picture"):
            depth_curves(CURVES, 1 / 9, path)


def test_mismatched_columns(tmp_path):
    for maps, titles, rows in (
        ([torch.zeros(3, 4, 4)], ["map"], []),
        ([], ["map"], []),
        ([], [], ["one"]),
    ):
        with pytest.raises(ValueError, match="a sheet of 2 images"):
            contribution_sheet(digits(), maps, titles, tmp_path / "x.png", row_titles=rows)


def test_no_global_plotting_state():
    source = Path(sys.modules["pipeline.reports.sheets"].__file__).read_text()
    assert "pyplot" not in source
