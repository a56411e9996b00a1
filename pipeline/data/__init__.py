"""Data: sources (images and labels) -> .beton files with a manifest -> batches. The only package that imports FFCV."""

import torch
from numba import config

# numba's TBB layer, its first choice, waits for ever at the end of a process that has forked (FFCV's writer does) and
# may use one processor only. Must be set before FFCV is imported, which starts the threads.
config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]

_threads = torch.get_num_threads()
import ffcv  # noqa: E402, F401

torch.set_num_threads(_threads)  # importing FFCV has set it to 1
