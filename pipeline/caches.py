"""Where libraries keep what they compile and look up again: on this node, in a folder that is this
user's alone.

A home may be shared by many nodes, read-only, full or missing; no cache of a training or an
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

# environment variable -> folder
CACHES = {
    # compiled loops of FFCV
    "NUMBA_CACHE_DIR": "numba",
    # compiled kernels
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "torch-inductor",
    "TORCH_EXTENSIONS_DIR": "torch-extensions",
    "PYTORCH_KERNEL_CACHE_PATH": "torch-kernels",
    # what the driver compiles
    "CUDA_CACHE_PATH": "cuda",
    # its list of fonts
    "MPLCONFIGDIR": "matplotlib",
}


def use_local_caches() -> Path:
    """Make the folder of all caches and name it to the libraries, in variables that child processes
    inherit; returns the folder.

    It is CODA_CACHE, else coda-<uid> in the temporary folder. Libraries run the code that they find
    there: a default folder that others can write to is left alone, and a new one takes its place
    until this process ends. Variables that the user has set stay.

    Raises:
        UserError: CODA_CACHE is not a folder in which this user, and nobody else, can write.
    """
    folder = _chosen_folder() if os.environ.get("CODA_CACHE") else _default_folder()
    os.environ["CODA_CACHE"] = str(folder)
    for variable, name in CACHES.items():
        if not os.environ.get(variable):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
            os.environ[variable] = str(folder / name)
    # As every node makes its own, matplotlib would say on many that it is at work on its list of
    # fonts.
    logging.getLogger("matplotlib.font_manager").addFilter(_no_word_of_fonts)
    # a user whom the machine does not know: importing MLflow asks for a home
    if os.path.expanduser("~") == "~":
        (folder / "home").mkdir(mode=0o700, exist_ok=True)
        os.environ["HOME"] = str(folder / "home")
    return folder


def _no_word_of_fonts(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Matplotlib is building the font cache")


def _chosen_folder() -> Path:
    folder = Path(os.environ["CODA_CACHE"]).expanduser().resolve()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = (
            ""
            if _is_private(folder) and os.access(folder, os.W_OK | os.X_OK)
            else "others can write there, or you cannot"
        )
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        valid = "a folder on this node in which you can write, and nobody else"
        raise UserError(
            f"environment variable CODA_CACHE is {folder}: {reason}; it must be {valid}"
        )
    return folder


def _default_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"coda-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if _is_private(folder):
            return folder
    except OSError:
        # something else has the name, or a disk is full: the next line says so, if it is
        pass
    fresh = Path(tempfile.mkdtemp(prefix="coda-"))
    atexit.register(_remove, fresh, os.getpid())
    return fresh


def _is_private(folder: Path) -> bool:
    """Whether ``folder`` is a folder of this user's, no link to one, in which nobody else can
    write.
    """
    found = folder.lstat()
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _remove(folder: Path, owner: int) -> None:
    # not a process that was forked from it
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
