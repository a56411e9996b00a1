"""Random numbers, moves and boxes: pure functions with the distributions that they claim."""

import numpy as np
import pytest
import torch
from runs_for_tests import train_loader

from pipeline.data import sampling
from pipeline.distributed import World

INDICES = np.arange(20_000)


def obvious_twin(image: torch.Tensor, mirrored: bool, down: int, right: int) -> torch.Tensor:
    """Move an image pixel by pixel.

    The pixel at (row, column) comes from (row + down, column + right) of the image, which is
    mirrored first if ``mirrored``; outside of it, it is 0.
    """
    size = image.shape[-1]
    result = torch.zeros_like(image)
    for row in range(size):
        for column in range(size):
            if 0 <= row + down < size and 0 <= column + right < size:
                source = column + right
                result[:, row, column] = image[
                    :, row + down, size - 1 - source if mirrored else source
                ]
    return result


def test_flip_and_shift_are_the_obvious_ones(digits, make_recipe):
    recipe, padding = make_recipe(prepared=digits, flip=True, crop_padding=2), 2
    plain, moved = (
        train_loader(made, World(), 16) for made in (make_recipe(prepared=digits), recipe)
    )
    with plain.epoch(5) as images, moved.epoch(5) as results:
        before, after = next(images), next(results)
    mirrored, down, right = sampling.moves(0, 5, before.indices.numpy(), True, padding).T
    assert set(mirrored) == {0, 1}
    assert len(set(down)) > 2
    for number in range(16):
        twin = obvious_twin(
            before.images[number], mirrored[number], int(down[number]), int(right[number])
        )
        assert torch.equal(after.images[number], twin)


def test_flip_is_fair_and_shift_is_uniform():
    mirrored, down, right = sampling.moves(0, 0, INDICES, True, 4).T
    # Within four standard deviations.
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(INDICES))
    # All 9 x 9 shifts are equally likely:
    counts = np.bincount(((down + 4) * 9 + right + 4).astype(int), minlength=81)
    expected = len(INDICES) / 81
    # chi square with 80 degrees of freedom, p = 0.001.
    assert len(counts) == 81
    assert ((counts - expected) ** 2 / expected).sum() < 124.9
    assert not sampling.moves(0, 0, INDICES, False, 0).any()


@pytest.mark.parametrize(
    "other",
    [(1, 0, sampling.FLIP), (0, 1, sampling.FLIP), (0, 0, sampling.SHIFT_DOWN)],
    ids=["seed", "epoch", "stream"],
)
def test_draws_of_other_seeds_epochs_and_streams_are_unrelated(other):
    seed, epoch, stream = other
    first, second = (
        sampling.uniform(0, 0, INDICES, sampling.FLIP),
        sampling.uniform(seed, epoch, INDICES, stream),
    )
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(len(INDICES))
    # Neighbouring samples are unrelated, too.
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / np.sqrt(len(INDICES))


def test_a_draw_depends_on_its_own_sample_only():
    alone = sampling.uniform(7, 2, INDICES[500:501], sampling.FLIP)
    assert alone == sampling.uniform(7, 2, INDICES, sampling.FLIP)[500]


def test_random_boxes_are_inside_and_cover_the_claimed_areas():
    generator = np.random.default_rng(0)
    heights, widths = generator.integers(200, 400, (2, len(INDICES)))
    top, left, height, width = sampling.random_boxes(heights, widths, 0, 0, INDICES).T
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height <= heights).all()
    assert (left + width <= widths).all()
    area, aspect = height * width / (heights * widths), width / height
    assert 0.078 < area.min() < 0.09
    assert area.max() > 0.9
    assert 0.73 < aspect.min() < 0.77
    assert 1.3 < aspect.max() < 1.36
    # Boxes are wide as often as high.
    assert abs(np.log(aspect).mean()) < 0.01


def test_random_boxes_of_a_narrow_strip_fall_back_to_its_centre():
    heights, widths = np.full(50, 10), np.full(50, 1000)
    boxes = sampling.random_boxes(heights, widths, 0, 0, np.arange(50))
    assert (boxes == [0, (1000 - 13) // 2, 10, 13]).all()


def test_centre_boxes_are_central_squares():
    boxes = sampling.centre_boxes(np.array([256, 300, 1]), np.array([512, 256, 2]))
    assert boxes.tolist() == [[16, 144, 224, 224], [38, 16, 224, 224], [0, 0, 1, 1]]
