"""Recipes and pictures for the data tests."""

from pathlib import Path

import numpy as np
from ffcv.reader import Reader
from PIL import Image

from pipeline.data.sources import Split
from pipeline.data.stored_size import fit
from pipeline.recipe.load import from_dict
from pipeline.recipe.schema import DataRecipe, Recipe

AUGMENTED = {"flip": True, "crop_padding": 2}
"""Data settings of a simple augmentation."""


def recipe(
    prepared: Path, global_batch_size: int = 64, seed: int = 0, epochs: int = 1, **data: object
) -> Recipe:
    """Make a recipe, by default of the digits at 16 x 16."""
    data = {"source": "digits", "image_size": 16, "workers": 1, "prepared": str(prepared), **data}
    training = {"epochs": epochs, "global_batch_size": global_batch_size, "learning_rate": 0.1}
    return from_dict(
        {
            "name": "test",
            "model": {"name": "none"},
            "data": data,
            "training": training,
            "seed": seed,
        }
    )


def stored(split: Split, index: int, data: DataRecipe) -> np.ndarray:
    """Return the pixels (H, W, 3) of an image as they are written."""
    return fit(split.read(index), data, split.fixed_size)


def write_images(root: Path, **counts: int) -> None:
    """Write <root>/<split>/{cat,dog}/<number>.png, of sizes from 40 to 200 pixels.

    Each class has ``counts[split]`` images.
    """
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), np.uint8))
                size = tuple(int(side) for side in generator.integers(40, 201, 2))
                coarse.resize(size, Image.Resampling.BICUBIC).save(
                    root / split / label / f"{number}.png"
                )


def damage(path: Path, sample: int) -> None:
    """Damage the JPEG of ``sample`` in the .beton file ``path`` so that it cannot be decoded.

    Header and tables stay as they are.
    """
    address = int(Reader(str(path)).metadata["f0"]["data_ptr"][sample])
    with path.open("r+b") as file:
        file.seek(address)
        file.write(bytes(4))
