"""One cluster for all tests that need Slurm."""

import shutil
import tempfile
from pathlib import Path

import pytest
from local_slurm import MISSING, LocalSlurm


@pytest.fixture(scope="session")
def slurm():
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not found: apt-get install slurm-wlm munge")
    # pytest's own folders have names that are too long for sockets.
    folder = Path(tempfile.mkdtemp(prefix="coda-"))
    with LocalSlurm(folder) as cluster:
        yield cluster
    shutil.rmtree(folder)


@pytest.fixture
def python(slurm):
    """Jobs of one test may have an interpreter of their own."""
    before = slurm.environment["CODA_PYTHON"]
    yield
    slurm.environment["CODA_PYTHON"] = before
