"""Data: sources (images and labels) -> .beton files with a manifest -> batches. The only package that imports FFCV."""

import os

import torch

from pipeline.caches import use_local_caches

use_local_caches()  # numba looks for its folder when it is imported
from numba import config  # noqa: E402

# numba's TBB layer, its first choice, waits for ever at the end of a process that has forked (FFCV's writer does) and
# may use one processor only. Must be set before FFCV is imported, which starts the threads.
config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]
if not config.CACHE_DIR:  # type: ignore[attr-defined]  # somebody has imported numba before
    config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]  # type: ignore[attr-defined]

_threads = torch.get_num_threads()
import ffcv  # noqa: E402, F401

torch.set_num_threads(_threads)  # importing FFCV has set it to 1
