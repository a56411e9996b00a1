"""Data that many tests share."""

import pytest
from processes import forget_process_groups
from recipes_for_tests import small_recipe


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Folder in which the small recipe's .beton files stand ready, for recipes whose ``data.prepared`` is ``<folder>/data``."""
    from pipeline.data.write import prepare

    folder = tmp_path_factory.mktemp("prepared")
    prepare(small_recipe(folder))
    return folder


@pytest.fixture(autouse=True)
def own_process_groups():
    """Each test may open a process group of its own."""
    yield
    forget_process_groups()
