"""Data: sources (images and labels) -> .beton files with a manifest -> batches. The only package
that imports FFCV.
"""

import importlib.util
import os
import sys
from pathlib import Path
from unittest import mock

import torch

from pipeline.caches import use_local_caches

# numba looks for its folder when it is imported
use_local_caches()
from numba import config  # noqa: E402

# numba's TBB layer, its first choice, waits for ever at the end of a process that has forked
# (FFCV's writer does) and may use one processor only. Must be set before FFCV is imported, which
# starts the threads.
config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]
if not config.CACHE_DIR:  # type: ignore[attr-defined]  # somebody has imported numba before
    config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]  # type: ignore[attr-defined]


def _load_openmp() -> None:
    """Load numba's OpenMP layer where the system has no libgomp.so.1.0.0: with torch's, which is
    loaded as libgomp.so.1.

    A copy of the layer that asks for that name is made among the caches. Where torch brings none
    either, numba itself says what it lacks.
    """
    name = "numba.np.ufunc.omppool"
    try:
        __import__(name)
    except ImportError:
        if (spec := importlib.util.find_spec(name)) is None or not spec.origin:
            return
        copy = Path(config.CACHE_DIR) / Path(spec.origin).name  # type: ignore[attr-defined]
        part = copy.with_name(f".{copy.name}.{os.getpid()}")
        part.write_bytes(
            Path(spec.origin).read_bytes().replace(b"libgomp.so.1.0.0\0", b"libgomp.so.1\0\0\0\0\0")
        )
        # other processes may do the same now
        part.replace(copy)
        changed = importlib.util.spec_from_file_location(name, copy)
        assert changed and changed.loader
        try:
            module = importlib.util.module_from_spec(changed)
        except ImportError:
            return
        changed.loader.exec_module(module)
        sys.modules[name] = module


_load_openmp()
_threads = torch.get_num_threads()
# FFCV makes a dictionary of two words when it is imported. As one of numba's, it would be compiled
# for 6 s in each process.
with mock.patch("numba.typed.Dict", dict):
    import ffcv  # noqa: F401
# importing FFCV has set it to 1
torch.set_num_threads(_threads)
