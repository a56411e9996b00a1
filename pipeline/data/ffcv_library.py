"""FFCV, set up so that it works beside torch, in forked processes and without a compiler.

Nothing else imports FFCV. Its format is written down in ``beton``.
"""

import ctypes
import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from pipeline.caches import use_local_caches

# Functions of FFCV's library by the names under which compiled code finds them.
SYMBOLS = {"coda_ffcv_imdecode": "imdecode", "coda_ffcv_resize": "resize"}


@functools.cache
def load_ffcv() -> ModuleType:
    """Import FFCV, once per process, and let compiled code find its functions.

    What numba must know before that is set here: where it keeps compiled code, and which threads it
    uses. Its first choice, TBB, hangs at the end of a process that has forked, as FFCV's writer
    does, and may use one processor only.

    Raises:
        ImportError: FFCV, or a library that it needs, is missing.
    """
    use_local_caches()
    import numba

    # Its settings are made from the environment when it is imported.
    config: Any = numba.config
    config.THREADING_LAYER = "omp"
    # Somebody may have imported numba before its folder was named.
    if not config.CACHE_DIR:
        config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]
    _load_openmp(Path(config.CACHE_DIR))
    threads = torch.get_num_threads()
    # FFCV makes a dictionary of two words when it is imported. As one of numba's, it would be
    # compiled for 6 s in each process.
    with mock.patch("numba.typed.Dict", dict):
        import ffcv
    # Importing FFCV has set it to 1.
    torch.set_num_threads(threads)
    _name_functions()
    return ffcv


def _name_functions() -> None:
    """Let LLVM know the library's functions by name.

    With an address in it, numba would not keep compiled code for the next process.
    """
    import llvmlite.binding as llvm
    from ffcv.libffcv import lib

    for symbol, name in SYMBOLS.items():
        llvm.add_symbol(symbol, ctypes.cast(getattr(lib, name), ctypes.c_void_p).value)


def _load_openmp(cache: Path) -> None:
    """Load numba's OpenMP layer where the system has no libgomp.so.1.0.0.

    torch brings one, which is loaded as libgomp.so.1. A copy of the layer that asks for that name
    is made in ``cache``. Where torch brings none either, numba itself reports what it lacks.
    """
    name = "numba.np.ufunc.omppool"
    try:
        __import__(name)
    except ImportError:
        if (spec := importlib.util.find_spec(name)) is None or not spec.origin:
            return
        copy = cache / Path(spec.origin).name
        part = copy.with_name(f".{copy.name}.{os.getpid()}")
        layer = Path(spec.origin).read_bytes()
        part.write_bytes(layer.replace(b"libgomp.so.1.0.0\0", b"libgomp.so.1\0\0\0\0\0"))
        # Other processes may do the same now.
        part.replace(copy)
        changed = importlib.util.spec_from_file_location(name, copy)
        assert changed and changed.loader
        try:
            module = importlib.util.module_from_spec(changed)
        except ImportError:
            return
        changed.loader.exec_module(module)
        sys.modules[name] = module
