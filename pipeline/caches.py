"""Caches of libraries: on this node, in a folder in which only this user can write.

A home may be shared by many nodes, read-only, full or missing; no cache of a training run or an
evaluation is in it. Pretrained weights (HF_HOME, TORCH_HOME) stay where they are: what was
downloaded on a login node must be found on a compute node.
"""

import atexit
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

from pipeline.errors import UserError

# Environment variable -> name of the folder.
CACHES = {
    # Compiled loops of FFCV.
    "NUMBA_CACHE_DIR": "numba",
    # Compiled kernels.
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "torch-inductor",
    "TORCH_EXTENSIONS_DIR": "torch-extensions",
    "PYTORCH_KERNEL_CACHE_PATH": "torch-kernels",
    # Code that the driver compiles.
    "CUDA_CACHE_PATH": "cuda",
    # Matplotlib's list of fonts.
    "MPLCONFIGDIR": "matplotlib",
}


def use_local_caches() -> Path:
    """Make the folder of all caches, and let the libraries use it.

    They read environment variables, which child processes inherit; those that the user has set
    stay. The folder is CODA_CACHE, else coda-<uid> in the temporary folder. Libraries run the code
    that they find there: a default folder that others can write to is left alone, and a new one
    takes its place until this process ends.

    Returns:
        The folder.

    Raises:
        UserError: CODA_CACHE is not a folder in which this user, and nobody else, can write.
    """
    folder = _chosen_folder() if os.environ.get("CODA_CACHE") else _default_folder()
    os.environ["CODA_CACHE"] = str(folder)
    for variable, name in CACHES.items():
        if not os.environ.get(variable):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
            os.environ[variable] = str(folder / name)
    # Each node makes its own list of fonts, and matplotlib would report that on each.
    logging.getLogger("matplotlib.font_manager").addFilter(_is_not_about_building_fonts)
    # The machine does not know this user, and importing MLflow asks for a home.
    if os.path.expanduser("~") == "~":
        (folder / "home").mkdir(mode=0o700, exist_ok=True)
        os.environ["HOME"] = str(folder / "home")
    return folder


def _is_not_about_building_fonts(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Matplotlib is building the font cache")


def _chosen_folder() -> Path:
    """The folder CODA_CACHE, made if it is not there; raises UserError if it is not safe."""
    folder = Path(os.environ["CODA_CACHE"]).expanduser().resolve()
    reason = "others can write there, or you cannot"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError as error:
        reason = error.strerror or str(error)
    raise UserError(
        f"environment variable CODA_CACHE is {folder}: {reason}; "
        "it must be a folder on this node in which you can write, and nobody else"
    )


def _default_folder() -> Path:
    """This user's folder in the temporary folder, else a new one until this process ends."""
    folder = Path(tempfile.gettempdir()) / f"coda-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if _is_private(folder):
            return folder
    except OSError:
        # Something else has the name, or a disk is full, which the next line raises again.
        pass
    fresh = Path(tempfile.mkdtemp(prefix="coda-"))
    atexit.register(_remove, fresh, os.getpid())
    return fresh


def _is_private(folder: Path) -> bool:
    """Whether it is a folder of this user's, not a link, in which nobody else can write."""
    found = folder.lstat()
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _remove(folder: Path, owner: int) -> None:
    # A process that was forked from the owner leaves the folder alone.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
