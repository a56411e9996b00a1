"""Data that many tests share."""

import sys

import pytest
from recipes_for_tests import small_recipe


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Folder in which the small recipe's .beton files stand ready, for recipes whose ``data.prepared`` is ``<folder>/data``."""
    from pipeline.data.write import prepare

    folder = tmp_path_factory.mktemp("prepared")
    prepare(small_recipe(folder))
    return folder


@pytest.fixture(autouse=True)
def forget_process_groups():
    """Each test may open a process group of its own; DeepSpeed remembers the one of its first engine for good."""
    yield
    if "deepspeed" in sys.modules:
        import deepspeed
        from torch.distributed import ProcessGroup

        for name, value in vars(deepspeed.utils.groups).items():
            if isinstance(value, ProcessGroup):
                setattr(deepspeed.utils.groups, name, None)
        deepspeed.comm.comm.cdb = None
