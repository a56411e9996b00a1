"""Data that many tests share."""

import pytest
from processes import forget_process_groups
from recipes_for_tests import small_recipe

import pipeline.data  # noqa: F401  # says how numba works, before a test imports FFCV itself


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests that share something run in one process of ``pytest -n``: those of a file; those of Slurm, and of the MLflow server."""
    for item in items:
        folder = item.path.parent.name
        if folder != "training":  # long tests that share nothing
            item.add_marker(pytest.mark.xdist_group(folder if folder in ("slurm", "tracking") else str(item.path)))


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
