"""Localisation on planted maps, and the choice and tiling of grids."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pipeline.interpret.pointing_game import choose_grids, localisation_scores, make_grids, summary


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_scores(maps: Tensor, n: int) -> Tensor:
    """The definition, cell by cell, for sides that n divides."""
    scores = torch.zeros(maps.shape[:2], dtype=maps.dtype)
    height, width = maps.shape[2] // n, maps.shape[3] // n
    for grid in range(len(maps)):
        for k in range(n * n):
            positive = maps[grid, k].clamp(min=0)
            row, column = k // n * height, k % n * width
            if positive.sum() > 0:
                scores[grid, k] = (
                    positive[row : row + height, column : column + width].sum() / positive.sum()
                )
    return scores


@pytest.mark.parametrize("n", [1, 2, 3])
def test_maps_inside_their_own_cell_score_one(n):
    maps = torch.full((2, n * n, 4 * n, 5 * n), -7.0)
    for k in range(n * n):
        row, column = 4 * (k // n), 5 * (k % n)
        maps[:, k, row : row + 4, column : column + 5] = (
            torch.rand(4, 5, generator=generator()) + 0.1
        )
    assert torch.equal(localisation_scores(maps, n), torch.ones(2, n * n))
    if n > 1:
        # Each map lies in the cell of another.
        assert torch.equal(localisation_scores(maps.roll(1, dims=1), n), torch.zeros(2, n * n))


def test_uninformative_and_empty_maps():
    torch.testing.assert_close(
        localisation_scores(torch.ones(1, 9, 6, 9), 3), torch.full((1, 9), 1 / 9)
    )
    assert torch.equal(localisation_scores(torch.zeros(1, 9, 6, 9), 3), torch.zeros(1, 9))
    assert torch.equal(localisation_scores(-torch.ones(1, 9, 6, 9), 3), torch.zeros(1, 9))
    assert localisation_scores(torch.full((1, 4, 2, 2), torch.nan), 2).isnan().all()


def test_channels_cancel_before_the_clamp():
    """A position with +3 and -3 in two channels carries no evidence.

    Clamping the channels first would give it 3.
    """
    channels = torch.zeros(1, 4, 2, 2, 2)  # (G, n², C, H, W)
    # Evidence inside of cell 0.
    channels[0, 0, :, 0, 0] = torch.tensor([2.0, 0.0])
    # None outside.
    channels[0, 0, :, 1, 1] = torch.tensor([3.0, -3.0])
    assert localisation_scores(channels.sum(2), 2)[0, 0] == 1
    assert localisation_scores(channels.clamp(min=0).sum(2), 2)[0, 0] == 0.4


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_equals_the_definition(seed, n, height, width):
    maps = torch.randn(
        2, n * n, n * height, n * width, generator=generator(seed), dtype=torch.float64
    )
    torch.testing.assert_close(localisation_scores(maps, n), slow_scores(maps, n))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 6), (1, 1), (8, 5)])
def test_positions_across_a_border_are_split_by_area(height, width):
    """The same as scoring the map after nearest up-sampling to the resolution of the image."""
    maps = torch.randn(3, 9, height, width, generator=generator(1), dtype=torch.float64)
    upsampled = functional.interpolate(maps, size=(6 * height, 6 * width), mode="nearest")
    torch.testing.assert_close(localisation_scores(maps, 3), slow_scores(upsampled, 3))


def test_wrong_number_of_maps():
    with pytest.raises(ValueError, match=r"must be \(G, 9, H, W\), got \(1, 4, 6, 6\)"):
        localisation_scores(torch.ones(1, 4, 6, 6), 3)


def planted_samples() -> tuple[Tensor, Tensor, Tensor]:
    """5 classes with 6 samples each, in mixed order; some wrong, some correct but not confident."""
    labels = torch.arange(30) % 5
    logits = torch.randn(30, generator=generator(3))
    predictions = labels.clone()
    predictions[::7] = (labels[::7] + 1) % 5
    return logits, labels, predictions


def test_grids_hold_different_classes_and_use_the_most_confident_samples_first():
    logits, labels, predictions = planted_samples()
    grids = choose_grids(logits, labels, predictions, 2, 2, generator())
    assert grids.shape == (2, 4)
    assert grids.dtype == torch.int64
    assert all(len(set(labels[grid].tolist())) == 4 for grid in grids)
    used = grids.flatten().tolist()
    assert len(set(used)) == len(used)
    eligible = (predictions == labels) & (logits > 0)
    assert eligible[used].all()
    for label in range(5):
        by_logit = sorted(
            (i for i in range(30) if labels[i] == label and eligible[i]),
            key=lambda i: -logits[i].item(),
        )
        taken = [i for i in used if labels[i] == label]
        assert taken == by_logit[: len(taken)]


def test_choice_depends_on_the_generator_alone():
    samples = planted_samples()
    assert torch.equal(
        choose_grids(*samples, 2, 3, generator(1)), choose_grids(*samples, 2, 3, generator(1))
    )
    different = {
        tuple(choose_grids(*samples, 2, 1, generator(seed))[0].tolist()) for seed in range(10)
    }
    assert len(different) > 3


def test_equal_logits_go_by_index():
    labels = torch.tensor([1, 0, 1, 0, 3, 2, 3, 2])
    grids = choose_grids(torch.ones(8), labels, labels, 2, 2, generator())
    assert sorted(grids[0].tolist()) == [0, 1, 4, 5]
    assert sorted(grids[1].tolist()) == [2, 3, 6, 7]
    # Enough samples for a sort that is not stable to show.
    many = torch.arange(4000) % 4
    grids = choose_grids(torch.ones(4000), many, many, 2, 1000, generator())
    assert torch.equal(grids.sort(1).values, torch.arange(4000).view(1000, 4))


def test_sampling_goes_on_after_a_class_runs_out():
    """Class 0 has one image and four others have three.

    A stop at the first empty class would leave images unused.
    """
    labels = torch.tensor([0] + [1, 2, 3, 4] * 3)
    for seed in range(5):
        grids = choose_grids(torch.ones(13), labels, labels, 2, 100, generator(seed))
        # 3 if class 0 was never drawn, or drawn in a grid that leaves four classes.
        assert 2 <= len(grids) <= 3
        assert (labels[grids] == 0).sum() <= 1
    counts = {
        len(choose_grids(torch.ones(13), labels, labels, 2, 100, generator(seed)))
        for seed in range(20)
    }
    assert max(counts) == 3


def test_too_few_classes_give_no_grid_and_say_so(caplog):
    logits, labels, predictions = planted_samples()
    with caplog.at_level(logging.WARNING):
        grids = choose_grids(logits, labels, predictions, 3, 500, generator())
    assert grids.shape == (0, 9)
    assert grids.dtype == torch.int64
    eligible = int(((predictions == labels) & (logits > 0)).sum())
    assert (
        "0 of 500 grids of 3x3 images: 5 classes have images that are classified correctly "
        f"with p > 0.5, {eligible} such" in caplog.text
    )
    assert make_grids(torch.rand(30, 3, 2, 2)[grids]).shape == (0, 3, 6, 6)


def test_no_message_where_all_grids_are_made(caplog):
    choose_grids(*planted_samples(), 2, 2, generator())
    assert not caplog.records


def test_probability_of_exactly_one_half_is_not_confident():
    labels = torch.arange(4)
    assert (
        len(choose_grids(torch.tensor([1.0, 1.0, 1.0, 0.0]), labels, labels, 2, 1, generator()))
        == 0
    )


def test_grids_are_tiled_row_major():
    images = torch.rand(2, 9, 3, 4, 5, generator=generator())
    grids = make_grids(images)
    assert grids.shape == (2, 3, 12, 15)
    for k in range(9):
        row, column = 4 * (k // 3), 5 * (k % 3)
        assert torch.equal(grids[:, :, row : row + 4, column : column + 5], images[:, k])
    with pytest.raises(ValueError, match="n²"):
        make_grids(torch.rand(2, 8, 3, 4, 5))


def test_summary_pools_all_scores():
    found = summary(torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 8.0]]))
    assert found == {"mean": 3.0, "q25": 1.25, "median": 2.5, "q75": 3.75}
    with pytest.raises(ValueError, match="no scores"):
        summary(torch.zeros(0, 9))
