"""Recipes and prepared files that the data tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from batches import read
from runs_for_tests import train_loader
from small_data import AUGMENTED, recipe, write_images

from pipeline.data.epoch_loader import Batch, EpochLoader
from pipeline.data.prepare import prepare
from pipeline.distributed import World
from pipeline.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(tmp_path: Path) -> MakeRecipe:
    """Make a recipe of data settings, by default with prepared files in the test's own folder."""

    def make(**settings: object) -> Recipe:
        return recipe(**{"prepared": tmp_path / "prepared", **settings})

    return make


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder data.prepared of the digits, 16 x 16 pixels, stored raw."""
    folder = tmp_path_factory.mktemp("digits")
    prepare(recipe(folder))
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The data settings of a prepared image folder.

    It holds 24 + 10 smooth pictures of many sizes, stored as JPEG and shown at 48 x 48.
    """
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "source", train=12, val=5)
    settings = {
        "source": "imagefolder",
        "path": str(folder / "source"),
        "image_size": 48,
        "write_mode": "jpg",
    }
    prepare(recipe(folder, **settings))
    return {**settings, "prepared": str(folder)}


@pytest.fixture(scope="module")
def augmented(digits: Path) -> tuple[EpochLoader, list[Batch]]:
    """The augmented training loader of one process, and its first epoch."""
    loader = train_loader(recipe(digits, **AUGMENTED), World(), 64)
    return loader, read(loader)
