"""Removal curves of planted predictors that report exactly what is left of an image."""

import pytest
import torch
from torch import Tensor

from pipeline.interpret.pixel_removal import removal_curve


def encoded(batch: int, height: int, width: int) -> Tensor:
    images = torch.rand(
        batch, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return torch.cat([images, 1 - images], 1)


def count_left(images: Tensor) -> Tensor:
    """Logit of class c = (1 + c) * (pixels that are not 0 in every channel)."""
    left = images.abs().sum(1).gt(0).flatten(1).sum(1, keepdim=True).double()
    return left * torch.tensor([1.0, 2.0]) / 1000


def test_points_and_steps_of_the_protocol():
    """32x32: 256 pixels in 128 steps of 2; 23x24: 138 allowed, so 128 steps of 1."""
    for size, step in (((32, 32), 2), ((23, 24), 1)):
        images = encoded(2, *size)
        curve = removal_curve(count_left, images, images[:, 0], torch.tensor([0, 1]))
        left = size[0] * size[1] - step * torch.arange(129)
        assert curve.shape == (2, 129)
        torch.testing.assert_close(
            curve, torch.stack([left, 2 * left]).double().div(1000).sigmoid()
        )


@pytest.mark.parametrize("first", ["least", "most"])
def test_order_is_signed_and_each_image_has_its_own(first):
    """The logit is the sum of the importance left.

    Removing the most negative pixels raises it, removing the most positive ones lowers it.
    """
    images = encoded(3, 6, 7)
    maps = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def importance_left(masked: Tensor) -> Tensor:
        return (maps * masked.abs().sum(1).gt(0)).flatten(1).sum(1, keepdim=True)

    curve = removal_curve(
        importance_left,
        images,
        maps,
        torch.zeros(3, dtype=torch.int64),
        fraction=0.5,
        points=8,
        first=first,
    )
    for row, importance in zip(curve, maps.flatten(1), strict=True):
        order = importance.sort(descending=first == "most").values
        # 21 pixels go in 7 steps.
        expected = torch.stack([order[3 * k :].sum() for k in range(8)])
        torch.testing.assert_close(row, expected.sigmoid())
    assert (curve[:, 1] > curve[:, 0]).all() == (first == "least")


@pytest.mark.parametrize(("first", "gone"), [("least", [1, 2, 4, 6]), ("most", [0, 3, 5, 7])])
def test_ties_go_in_row_major_order(first, gone):
    maps = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]).view(1, 4, 4)
    seen: list[Tensor] = []

    def keep(masked: Tensor) -> Tensor:
        seen.append(masked)
        return torch.zeros(1, 1)

    removal_curve(keep, torch.ones(1, 6, 4, 4), maps, torch.tensor([0]), points=5, first=first)
    assert len(seen) == 5
    for step, masked in enumerate(seen):
        assert (masked == 0).all(1).flatten().nonzero().flatten().tolist() == gone[:step]
        # All six channels are 0, unlike black, which is 0 0 0 1 1 1.
        assert torch.equal((masked == 0).all(1), (masked == 0).any(1))


@pytest.mark.parametrize("first", ["least", "most"])
def test_equal_importance_everywhere_removes_rows_from_the_top(first):
    """Enough pixels for a sort that is not stable to show."""
    position = (
        torch.arange(64 * 64, dtype=torch.float64).view(1, 1, 64, 64).expand(1, 6, 64, 64) + 1
    )

    def first_left(images: Tensor) -> Tensor:
        return (
            images[:, 0]
            .flatten(1)
            .masked_fill(images[:, 0].flatten(1) == 0, torch.inf)
            .amin(1, keepdim=True)
            / 1000
        )

    curve = removal_curve(
        first_left, position, torch.zeros(1, 64, 64), torch.tensor([0]), first=first
    )
    torch.testing.assert_close(curve[0], ((torch.arange(129) * 8 + 1) / 1000).double().sigmoid())


def test_images_are_left_alone_and_no_graph_is_kept():
    images = encoded(2, 4, 4)
    before, weight = images.clone(), torch.ones(1, requires_grad=True)
    curve = removal_curve(
        lambda x: x.sum((2, 3)) * weight, images, images[:, 0], torch.tensor([0, 5]), points=5
    )
    assert torch.equal(images, before)
    assert not curve.requires_grad


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        ((2, 6, 8, 8), {}, "summed over channels"),
        ((2, 4, 4), {}, "summed over channels"),
        ((2, 8, 8), {}, "25% of 8x8 pixels are fewer than the 128 steps"),
        ((2, 8, 8), {"points": 1}, "points=1"),
        ((2, 8, 8), {"fraction": 1.5}, "fraction=1.5"),
        ((2, 8, 8), {"first": "last"}, "'last'"),
    ],
)
def test_impossible_curves_are_refused(maps, options, message):
    with pytest.raises(ValueError, match=message):
        removal_curve(
            count_left, encoded(2, 8, 8), torch.zeros(maps), torch.tensor([0, 1]), **options
        )
