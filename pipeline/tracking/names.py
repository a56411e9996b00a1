"""The one table of metric names, with what each means and what its steps count: runs with other
batch sizes and GPU counts line up.
"""

from typing import get_args

from pipeline.recipe.schema import Method

_IMAGES, _EPOCH, _LAYER = "images seen", "epoch", "layer index, from the output back to the input"
# name -> (meaning, what its steps count)
METRICS = {
    "train/loss": ("loss of the last update, mean over its images", _IMAGES),
    "train/learning_rate": ("learning rate of the last update", _IMAGES),
    "speed/images_per_second": ("training images per second, all processes together", _IMAGES),
    "speed/device_hours": (
        "hours x processes so far, evaluations included, summed over all attempts as far as they were logged",
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
# judged of every method's maps
_OF_MAPS = {
    "localisation": "mean of the grid pointing game where the method makes its map",
    "localisation_2x2": "mean of the game with grids of 2x2",
    "pixel_removal": "pixel_removal_least - pixel_removal_most: 1 is best, 0 is a random order",
    "pixel_removal_least": "probability of the true class while the least important quarter of the pixels goes",
    "pixel_removal_most": "probability of the true class while the most important quarter of the pixels goes",
    "depth": "interpretable depth: the largest distance from the output that still localises",
    "area": "area under the curve of localisation against distance from the output",
}
# the network's own contributions have short names
for _method in get_args(Method):
    _of = "interp" if _method == "contributions" else f"interp/{_method}"
    METRICS |= {
        f"{_of}/{name}": (f"{_method}: {meaning}", _EPOCH) for name, meaning in _OF_MAPS.items()
    }
    for _base in ("localisation", "localisation_2x2"):
        METRICS |= {
            f"{_of}/{_base}_{q}": (f"{_method}: {_base}, {q}", _EPOCH)
            for q in ("q25", "median", "q75")
        }
for _stat in ("", "_q25", "_median", "_q75"):
    _meaning = f"grid pointing game where the CoDA part begins, {_stat[1:] or 'mean'}"
    METRICS[f"interp/localisation_junction{_stat}"] = (_meaning, _EPOCH)
