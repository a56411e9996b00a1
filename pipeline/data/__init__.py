"""Data: sources (images and labels) -> .beton files with a manifest -> batches. The only package that imports FFCV."""

import os
import tempfile
from pathlib import Path

import torch
from numba import config

# numba's TBB layer, its first choice, waits for ever at the end of a process that has forked (FFCV's writer does) and
# may use one processor only. Must be set before FFCV is imported, which starts the threads.
config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]


def _private_folder(path: Path) -> bool:
    """Make ``path`` if needed; whether it is this user's alone, as numba runs whatever code it finds there."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    return found.st_uid == os.getuid() and found.st_mode & 0o40777 == 0o40700


# Compiled code is kept on the node: beside the source files, which many nodes may share, they would disturb each other.
if not config.CACHE_DIR:  # type: ignore[attr-defined]
    _cache = Path(tempfile.gettempdir()) / f"coda-numba-{os.getuid()}"
    if _private_folder(_cache):
        config.CACHE_DIR = str(_cache)  # type: ignore[attr-defined]

_threads = torch.get_num_threads()
import ffcv  # noqa: E402, F401

torch.set_num_threads(_threads)  # importing FFCV has set it to 1
