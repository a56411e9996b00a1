"""Recipes and prepared files that the data tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_data import recipe, write_images

from pipeline.data.prepare import prepare
from pipeline.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(tmp_path: Path) -> MakeRecipe:
    """Recipe of the data settings given; prepared files go to the test's own folder unless it says
    otherwise.
    """
    return lambda **settings: recipe(settings.pop("prepared", tmp_path / "prepared"), **settings)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.prepared of the digits at 16 x 16, raw."""
    folder = tmp_path_factory.mktemp("digits")
    prepare(recipe(folder))
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data settings of a prepared image folder: 24 + 10 smooth pictures of many sizes, stored as
    JPEG, shown at 48 x 48.
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
