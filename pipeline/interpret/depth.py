"""Interpretable depth: how far from the output contributions still explain it.

The definitions are this project's own (docs/method.md). A curve holds the mean localisation of the
contributions of each layer at that layer's distance from the output: the share in [0, 1] of the
parametric layers in between, 0 at the output and 1 at the input encoding.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise

Curve = Mapping[float, float] | Iterable[tuple[float, float]]


def interpretable_depth(scores_by_distance: Curve, threshold: float = 0.5) -> float:
    """Find the largest distance whose score is at least the threshold, 0 if none is.

    Raises:
        ValueError: the curve is empty, a distance is outside [0, 1], or a score is not finite.
    """
    return max(
        (distance for distance, score in _points(scores_by_distance) if score >= threshold),
        default=0.0,
    )


def interpretable_area(scores_by_distance: Curve) -> float:
    """Compute the area under the curve over [0, 1] by the trapezoidal rule.

    The outermost scores are held constant up to 0 and 1.

    Raises:
        ValueError: as ``interpretable_depth``.
    """
    points = _points(scores_by_distance)
    points = [(0.0, points[0][1]), *points, (1.0, points[-1][1])]
    return sum((right - left) * (a + b) / 2 for (left, a), (right, b) in pairwise(points))


def _points(curve: Curve) -> list[tuple[float, float]]:
    """Check the points and sort them by distance; points of one distance keep their order."""
    pairs = curve.items() if isinstance(curve, Mapping) else curve
    points = [(float(distance), float(score)) for distance, score in pairs]
    if not points:
        raise ValueError("a depth curve needs at least one (distance, score) point")
    for distance, score in points:
        if not (0 <= distance <= 1 and math.isfinite(score)):
            raise ValueError(
                f"a depth curve has distances in [0, 1] and finite scores, "
                f"got ({distance}, {score})"
            )
    return sorted(points, key=lambda point: point[0])
