"""The one table of metric names, with what each means and what its steps count.

Runs with other batch sizes and GPU counts line up, since no step counts updates.
"""

from typing import get_args

from pipeline.recipe.schema import Method

_IMAGES = "images seen"
_EPOCH = "epoch"
_LAYER = "layer index, from the output back to the input"

# Of training, of the validation images, and of the network's explanations as a whole.
_PLAIN = {
    "train/loss": ("loss of the last update, mean over its images", _IMAGES),
    "train/learning_rate": ("learning rate of the last update", _IMAGES),
    "speed/images_per_second": ("training images per second, all processes together", _IMAGES),
    "speed/device_hours": (
        "hours x processes so far, evaluations included, "
        "summed over all attempts as far as they were logged",
        _IMAGES,
    ),
    "val/loss": ("loss, mean over the validation images", _EPOCH),
    "val/top1": ("share of validation images whose largest logit is the label's", _EPOCH),
    "val/top5": (
        "share of validation images whose label has one of the five largest logits",
        _EPOCH,
    ),
    "interp/completeness_error": (
        "|sum of contributions - T (logit - b0)| / sum of |contributions|",
        _EPOCH,
    ),
    "interp/alignment": ("cos(w, x) of the DAU layers: mean of their medians", _EPOCH),
    "interp/grids": ("number of grids behind the localisation", _EPOCH),
    "interp/localisation_by_layer": (
        "mean localisation of each layer, at the end of the run",
        _LAYER,
    ),
    "interp/alignment_by_layer": (
        "median of cos(w, x) of each DAU layer, at the end of the run",
        _LAYER,
    ),
}
# Of the maps of every method.
_OF_MAPS = {
    "localisation": "mean of the grid pointing game where the method makes its map",
    "localisation_2x2": "mean of the game with grids of 2x2",
    "pixel_removal": "pixel_removal_least - pixel_removal_most: 1 is best, 0 is a random order",
    "pixel_removal_least": (
        "probability of the true class while the least important quarter of the pixels goes"
    ),
    "pixel_removal_most": (
        "probability of the true class while the most important quarter of the pixels goes"
    ),
    "depth": "interpretable depth: the largest distance from the output that still localises",
    "area": "area under the curve of localisation against distance from the output",
}
_QUANTILES = ("q25", "median", "q75")


def _of_methods() -> dict[str, tuple[str, str]]:
    """The names of ``_OF_MAPS`` for every method, with quantiles of the localisation."""
    table = {}
    for method in get_args(Method):
        # The network's own contributions have short names.
        group = "interp" if method == "contributions" else f"interp/{method}"
        for name, meaning in _OF_MAPS.items():
            table[f"{group}/{name}"] = (f"{method}: {meaning}", _EPOCH)
        for name in ("localisation", "localisation_2x2"):
            for quantile in _QUANTILES:
                table[f"{group}/{name}_{quantile}"] = (f"{method}: {name}, {quantile}", _EPOCH)
    return table


def _of_junction() -> dict[str, tuple[str, str]]:
    """The names of the localisation where the CoDA part of a hybrid begins."""
    name = "interp/localisation_junction"
    meaning = "grid pointing game where the CoDA part begins"
    table = {name: (f"{meaning}, mean", _EPOCH)}
    for quantile in _QUANTILES:
        table[f"{name}_{quantile}"] = (f"{meaning}, {quantile}", _EPOCH)
    return table


METRICS: dict[str, tuple[str, str]] = {**_PLAIN, **_of_methods(), **_of_junction()}
"""Name -> (meaning, what its steps count)."""
