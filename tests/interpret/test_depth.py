"""Interpretable depth and area on curves whose answers are known by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.interpret.depth import interpretable_area, interpretable_depth

CURVE = [(0.1, 0.9), (0.4, 0.5), (0.6, 0.2), (1.0, 0.1)]


def test_hand_numbers():
    assert interpretable_depth(CURVE) == 0.4
    assert interpretable_depth(CURVE, threshold=0.51) == 0.1
    # The score is held at .9 up to .1; trapezoids follow.
    assert interpretable_area(CURVE) == pytest.approx(
        0.1 * 0.9 + 0.3 * 0.7 + 0.2 * 0.35 + 0.4 * 0.15
    )


def test_depth_is_the_largest_distance_even_after_a_dip():
    assert interpretable_depth([(0.0, 0.4), (0.3, 0.2), (0.7, 0.6), (1.0, 0.1)]) == 0.7


def test_never_and_always_reached():
    assert interpretable_depth([(0.2, 0.1), (1.0, 0.3)]) == 0
    assert interpretable_depth([(0.2, 0.8), (1.0, 0.5)]) == 1


def test_single_point_is_held_constant():
    assert interpretable_area([(0.3, 0.7)]) == pytest.approx(0.7)
    assert interpretable_depth([(0.3, 0.7)]) == 0.3


def test_last_score_is_held_up_to_the_input():
    assert interpretable_area([(0.0, 1.0), (0.5, 0.0)]) == pytest.approx(0.25)
    assert interpretable_area([(0.0, 0.0), (0.5, 1.0)]) == pytest.approx(0.75)


@given(st.permutations(CURVE))
def test_order_and_form_do_not_matter(points):
    assert (
        interpretable_area(points)
        == interpretable_area(dict(points))
        == interpretable_area(iter(CURVE))
    )
    assert interpretable_depth(points) == interpretable_depth(dict(points)) == 0.4


@given(st.dictionaries(st.floats(0, 1), st.floats(0, 1), min_size=1))
def test_area_lies_between_the_extreme_scores(curve):
    assert min(curve.values()) - 1e-9 <= interpretable_area(curve) <= max(curve.values()) + 1e-9


@pytest.mark.parametrize("measure", [interpretable_depth, interpretable_area])
@pytest.mark.parametrize(
    "curve",
    [[], {}, [(-0.1, 0.5)], [(1.1, 0.5)], [(0.5, math.nan)], [(math.nan, 0.5)], [(0.5, math.inf)]],
)
def test_bad_curves_are_refused(measure, curve):
    with pytest.raises(ValueError, match="depth curve"):
        measure(curve)
