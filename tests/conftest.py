"""Data that many tests share."""

from pathlib import Path

import pytest
from processes import forget_process_groups
from recipes_for_tests import small_recipe
from xdist.scheduler import LoadScopeScheduling

from pipeline.data.ffcv_library import load_ffcv

# This comes before any test imports FFCV.
load_ffcv()


class Sharing(LoadScopeScheduling):
    """Run tests that share something in one process of ``pytest -n``.

    These are the tests of a file, those of Slurm, and those of the MLflow server.
    """

    def _split_scope(self, nodeid):
        file, _, _ = nodeid.partition("::")
        folder = Path(file).parent.name
        # These are long and share nothing.
        if folder == "training":
            return nodeid
        return folder if folder in ("slurm", "tracking") else file


def pytest_xdist_make_scheduler(config, log):
    return Sharing(config, log)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Folder with the small recipe's .beton files.

    Recipes use them if their ``data.prepared`` is ``<folder>/data``.
    """
    from pipeline.data.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared")
    prepare(small_recipe(folder))
    return folder


@pytest.fixture(autouse=True)
def own_process_groups():
    """Let each test open a process group of its own."""
    yield
    forget_process_groups()
