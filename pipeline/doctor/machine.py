"""Probes of the machine itself, which need no package.

Each probe returns what it found, or raises what is wrong.
"""

import contextlib
import fcntl
import glob
import math
import mmap
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from pipeline.caches import use_local_caches
from pipeline.errors import UserError
from pipeline.files import NETWORK_FILE_SYSTEMS, file_system

# For all checks together.
SECONDS = 60.0
# Of a small run: its checkpoints, export and pictures.
RUN_BYTES = 1e9
# Of a small data set.
DATA_BYTES = 1e8
# For semaphores; the nccl check finds out whether there is room for NCCL.
SHM_BYTES = 16e6
# Of the code that libraries compile.
CACHE_BYTES = 2e8
# The imports of a training run take 1 GB.
MEMORY_BYTES = 2e9


def seconds() -> float:
    """The time for all checks: CODA_DOCTOR_SECONDS, or a minute.

    Raises:
        UserError: it is not a positive number.
    """
    text = os.environ.get("CODA_DOCTOR_SECONDS") or str(SECONDS)
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise UserError(
        f"environment variable CODA_DOCTOR_SECONDS is {text!r}; "
        "it must be a positive number of seconds"
    )


def tracking_variable() -> dict[str, str]:
    """MLflow's own variable for its address, if it is set."""
    name = "MLFLOW_TRACKING_URI"
    return {name: os.environ[name]} if os.environ.get(name) else {}


def python(oldest: tuple[int, int]) -> str:
    """The version of this interpreter."""
    version = sys.version.split()[0]
    if sys.version_info < oldest:
        raise RuntimeError(f"{version} is too old: {'.'.join(map(str, oldest))} or newer is needed")
    return f"{version}, {sys.executable}"


def memory(root: Path = Path("/")) -> str:
    """The memory that is available, and the limit of the control groups (a job's, a container's).

    Args:
        root: of the file system.
    """
    text = (root / "proc/meminfo").read_text()
    kilobytes = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    assert kilobytes
    available, limits = int(kilobytes[1]) * 1024, _memory_limits(root)
    if min(available, *limits) < MEMORY_BYTES:
        raise MemoryError(
            f"{min(available, *limits) / 1e9:.1f} GB, "
            f"fewer than the {MEMORY_BYTES / 1e9:g} GB of the smallest training run"
        )
    found = f"{available / 1e9:.1f} GB available"
    if limits and min(limits) < available:
        found += f", of which this job or container may use {min(limits) / 1e9:.1f} GB"
    return found


def _memory_limits(root: Path) -> list[int]:
    limits = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            base, name = "sys/fs/cgroup", "memory.max"
            if controllers:
                base, name = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            group = root / base / place.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(root / base):
                    # No limit is "max", and a namespace may hide the folder.
                    with contextlib.suppress(OSError, ValueError):
                        limits.append(int((folder / name).read_text()))
    return limits or [sys.maxsize]


def processors() -> str:
    """The number of processors that this process may use.

    The only one of a machine is slow, and yet enough; one of several is a mistake.
    """
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count()
    if usable < 2 and there != usable:
        raise RuntimeError(
            f"this process may use 1 of {there}: too few to load images beside training"
        )
    return f"this process may use {usable} of {there}"


def runs_folder(folder: Path) -> str:
    """Runs can be written below ``folder``."""
    place, found = _room(folder, RUN_BYTES)
    warning = "; SQLite's locks are not safe there: tracking.uri=http://HOST:PORT of `coda serve`"
    return found + (warning if file_system(place) in NETWORK_FILE_SYSTEMS else "")


def data_folder(folder: Path) -> str:
    """Data are prepared in ``folder`` and readable, or else can be written there."""
    manifest = folder / "manifest.json"
    if manifest.exists():
        manifest.read_bytes()
        return f"{folder} is prepared"
    place, found = _room(folder, DATA_BYTES)
    with tempfile.TemporaryFile(dir=place) as file:
        # By such a lock writers keep each other out.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return f"{folder} is not prepared yet; {found}"


def shared_memory() -> str:
    """There is room in /dev/shm, for the semaphores of a node's processes and NCCL's buffers."""
    return _room(Path("/dev/shm"), SHM_BYTES, digits=2)[1]


def caches() -> str:
    """Compiled code can be kept, and loaded from where it is kept."""
    folder = use_local_caches()
    place, found = _room(folder, CACHE_BYTES)
    if _runs_code(place):
        return found
    refused = (
        f"{found}, but no code can be loaded from there (mounted noexec), "
        "as the kernels for a GPU are"
    )
    if glob.glob("/dev/nvidia[0-9]*"):
        raise PermissionError(refused)
    return f"{refused}: with a GPU set CODA_CACHE to a folder elsewhere"


def _runs_code(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * mmap.PAGESIZE)
        file.flush()
        use = mmap.PROT_READ | mmap.PROT_EXEC
        try:
            mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE, use).close()
        except PermissionError:
            return False
    return True


def existing(folder: Path) -> Path:
    """``folder``, or the nearest folder above it that is there."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())


def _room(folder: Path, needed: float, digits: int = 0) -> tuple[Path, str]:
    """Check that ``folder`` is, or could be, in a writable place with ``needed`` bytes free."""
    place = existing(folder)
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"coda")
        file.flush()
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(f"{place} has {free / 1e9:.3f} GB free, fewer than {needed / 1e9:g} GB")
    return place, f"{place} ({file_system(place)}) is writable, {free / 1e9:.{digits}f} GB free"


def one_line(error: BaseException) -> str:
    """Kind and message of an error, cut to what fits a line or two."""
    text = " ".join(str(error).split())
    return (text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")[:400]


def without_passwords(text: str) -> str:
    """``text`` without the parts between :// and @ in it."""
    return re.sub(r"://[^\s'\"]*@", "://...@", text)
