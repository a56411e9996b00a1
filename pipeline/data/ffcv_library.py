"""FFCV, set up so that it works beside torch, in forked processes and without a compiler.

FFCV must be loaded here before any other module imports a part of it. Its file format is in
``beton``.
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

SYMBOLS = {"coda_ffcv_imdecode": "imdecode", "coda_ffcv_resize": "resize"}
"""Functions of FFCV's library, by the names under which compiled code finds them."""


@functools.cache
def load_ffcv() -> ModuleType:
    """Import FFCV, once per process, and let compiled code find its functions.

    Before that, numba is told where to keep compiled code and to use OpenMP's threads. Its first
    choice, TBB, hangs at the end of a process that has forked, and may use one processor only.

    Raises:
        ImportError: FFCV, or a library that it needs, is missing.
    """
    use_local_caches()
    import numba

    # numba reads the environment when it is imported, which may have happened before.
    config: Any = numba.config
    config.THREADING_LAYER = "omp"
    if not config.CACHE_DIR:
        config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]
    _load_openmp(Path(config.CACHE_DIR))
    threads = torch.get_num_threads()
    # FFCV makes a dictionary of two words when it is imported. A dictionary of numba's would be
    # compiled in each process, which takes 6 s.
    with mock.patch("numba.typed.Dict", dict):
        import ffcv
    # The import of FFCV sets torch's threads to 1.
    torch.set_num_threads(threads)
    _name_functions()
    library: ModuleType = ffcv
    return library


def _name_functions() -> None:
    """Tell LLVM the library's functions by name.

    numba does not keep code for the next process if it was compiled with their addresses.
    """
    import llvmlite.binding as llvm
    from ffcv.libffcv import lib

    for symbol, name in SYMBOLS.items():
        llvm.add_symbol(symbol, ctypes.cast(getattr(lib, name), ctypes.c_void_p).value)


def _load_openmp(cache: Path) -> None:
    """Load numba's OpenMP layer where the system has no libgomp.so.1.0.0.

    torch brings one, which is loaded as libgomp.so.1. So a copy of the layer that asks for that
    name is made in ``cache``. Where torch has none either, numba itself reports what is missing.
    """
    name = "numba.np.ufunc.omppool"
    try:
        __import__(name)
    except ImportError:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin:
            return
        copy = cache / Path(spec.origin).name
        part = copy.with_name(f".{copy.name}.{os.getpid()}")
        layer = Path(spec.origin).read_bytes()
        part.write_bytes(layer.replace(b"libgomp.so.1.0.0\0", b"libgomp.so.1\0\0\0\0\0"))
        # Atomically, as other processes may do the same at this moment.
        part.replace(copy)
        changed = importlib.util.spec_from_file_location(name, copy)
        assert changed is not None
        assert changed.loader is not None
        try:
            module = importlib.util.module_from_spec(changed)
        except ImportError:
            return
        changed.loader.exec_module(module)
        sys.modules[name] = module
