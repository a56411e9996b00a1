"""A recipe small enough to train in seconds: the digits at their own 8x8 pixels."""

from pathlib import Path

from pipeline.recipe.load import from_dict
from pipeline.recipe.schema import Recipe


def small_recipe(folder: Path, **changes) -> Recipe:
    """Make a recipe on 8x8 digits whose files live in ``folder``.

    Args:
        folder: parent of the data and the runs.
        changes: values by dotted key, with "__" for the dot.
    """
    tree = {
        "name": "small",
        "runs": str(folder / "runs"),
        "model": {"name": "coda_s", "args": {"rank": 2, "temperature": 10.0}},
        "data": {
            "source": "digits",
            "image_size": 8,
            "prepared": str(folder / "data"),
            "crop_padding": 1,
            "workers": 1,
        },
        "training": {
            "epochs": 2,
            "global_batch_size": 128,
            "learning_rate": 3e-3,
            "clip_grad_norm": 1.0,
        },
        "evaluation": {"final_metrics": ["accuracy"]},
        "tracking": {"log_every_updates": 1},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = tree
        for name in sections:
            section = section[name]
        section[last] = value
    return from_dict(tree)
