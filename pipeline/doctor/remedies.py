"""Remedies for failed checks, on this kind of machine. Standard library only."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).resolve().parents[2]
# Library that a Python package was seen to miss -> Debian's package that has it.
_DEBIAN = {
    "libgomp.so.1": "libgomp1",
    "libstdc++.so.6": "libstdc++6",
    "libgcc_s.so.1": "libgcc-s1",
    "libGL.so.1": "libgl1",
    "libgthread-2.0.so.0": "libglib2.0-0",
    "libnuma.so.1": "libnuma1",
}


class Surroundings(NamedTuple):
    """The kind of machine."""

    apt: str = ""
    """The command that installs Debian's packages; empty where there is none, or no right to it."""
    modules: bool = False
    """There are environment modules, as on clusters."""
    container: str = ""
    """The runtime: docker (or podman) or apptainer; empty outside of a container."""
    checkout: bool = False
    """The package is used in the project's own folder, with its Makefile; it is not installed."""
    slurm: bool = False
    """The process is part of a job."""


def surroundings(root: Path = Path("/"), checkout: Path = _ROOT) -> Surroundings:
    """Find out what kind of machine this is.

    Args:
        root: of the file system.
        checkout: the project's own folder, if there is one.
    """
    sudo = "" if os.getuid() == 0 else "sudo "
    allowed = not sudo or shutil.which("sudo")
    inside = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")
    apptainer = any(os.environ.get(name) for name in inside)
    docker = any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
    modules = any(os.environ.get(name) for name in ("MODULEPATH", "LMOD_CMD"))
    return Surroundings(
        apt=f"{sudo}apt-get install" if shutil.which("apt-get") and allowed else "",
        modules=modules or shutil.which("modulecmd") is not None,
        container="apptainer" if apptainer else "docker" if docker else "",
        checkout=(checkout / "Makefile").is_file() and (checkout / "pyproject.toml").is_file(),
        slurm="SLURM_JOB_ID" in os.environ,
    )


def remedies(here: Surroundings) -> Callable[[str, str], str]:
    """The function from (name of a check, what it found) to what to do about it ``here``."""

    def remedy(name: str, detail: str) -> str:
        if "no answer within" in detail:
            return (
                "the machine or its file system is slow, or waits for something: "
                "call again, or with CODA_DOCTOR_SECONDS=300"
            )
        if library := re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file", detail):
            return _library(library[1], here)
        # Any check that starts a process group may find this.
        if "loopback interface" in detail:
            name = "process group"
        known = {
            "python": _python(here),
            "memory": _memory(here),
            "processors": _processors(here),
            "runs folder": "choose a writable folder with room: runs=FOLDER",
            "data folder": (
                "choose a writable folder with room, whose file system has locks: "
                "data.prepared=FOLDER"
            ),
            "/dev/shm": _shared_memory(here),
            "caches": (
                "set CODA_CACHE to a writable folder on a disk of this machine "
                "that is not mounted noexec"
            ),
            "torchvision": f"install the one that is made for this torch: {_reinstall(here)}",
            "process group": (
                "allow TCP connections on the loopback interface; "
                "`getent hosts $(hostname)` must answer"
            ),
            "gpu": _gpu(here),
            "nccl": (
                "run again with NCCL_DEBUG=INFO; in a job ask for --gpus-per-node and "
                f"--gpu-bind=none; {_shared_memory(here)}"
            ),
            "kernels": _kernels(detail, here),
            "tracking.uri": _tracking(detail),
            "MLFLOW_TRACKING_URI": (
                f"{_tracking(detail)}; or unset the variable, which no training run reads: "
                "recipes have tracking.uri"
            ),
        }
        return known.get(name) or _reinstall(here)

    return remedy


def _reinstall(here: Surroundings) -> str:
    command = "make setup" if here.checkout else "pip install 'coda-pipeline[train]'"
    return f"{command}, where the container's image is made" if here.container else command


def _memory(here: Surroundings) -> str:
    if here.slurm:
        return "in a Slurm job ask for more: --mem=16G"
    return "end other programs, or take another machine"


def _processors(here: Surroundings) -> str:
    if here.slurm:
        return "srun --cpus-per-task=8 (srun does not inherit it from sbatch)"
    if here.container:
        return "give the container more: --cpuset-cpus; in a Slurm job --cpus-per-task=8"
    return "call it without taskset; in a Slurm job srun --cpus-per-task=8"


def _python(here: Surroundings) -> str:
    if here.modules:
        return (
            "module avail python; load a module of Python 3.11 or newer, or ask for one, "
            "then make setup PYTHON=python3.11"
        )
    if here.apt:
        return (
            f"{here.apt} python3.11 python3.11-venv (or a newer one), "
            "then make setup PYTHON=python3.11"
        )
    return (
        "install Python 3.11 or newer in your own folder (uv python install, conda), "
        "then make setup PYTHON=/path/to/it"
    )


def _library(name: str, here: Surroundings) -> str:
    if here.apt and name in _DEBIAN:
        return f"{here.apt} {_DEBIAN[name]}"
    if here.apt:
        return f"install the Debian package that has {name}: apt-file search {name}"
    if here.container:
        return f"install {name} into the container's image"
    if here.modules:
        return (
            f"module spider {name.split('.so')[0]}; "
            f"load a module that has {name} (often gcc), or ask for one"
        )
    return (
        f"{_reinstall(here)}; if {name} is still missing, "
        "`conda install -c conda-forge` has most such libraries without root"
    )


def _shared_memory(here: Surroundings) -> str:
    if here.container == "docker":
        return "start the container with --shm-size=8g, or --ipc=host"
    if here.container == "apptainer":
        return (
            "/dev/shm is the host's unless apptainer was started with --contain: "
            "leave that out, or add --bind /dev/shm"
        )
    if os.getuid() == 0:
        return "mount -o remount,size=8g /dev/shm"
    return "/dev/shm must be a writable tmpfs with room: ask the administrators"


def _gpu(here: Surroundings) -> str:
    if here.container:
        option = "--nv" if here.container == "apptainer" else "--gpus all"
        return (
            f"start the container with {option}; "
            "its torch must be built for the CUDA version of the host's driver"
        )
    if here.slurm:
        return (
            "ask for --gpus-per-node; torch must be built for the CUDA version of the node's "
            "driver, which nvidia-smi shows"
        )
    return (
        "install a torch for the CUDA version of the driver, which nvidia-smi shows "
        "(pytorch.org lists them), or a newer driver"
    )


def _kernels(detail: str, here: Surroundings) -> str:
    if "compiler" not in detail:
        return (
            "training runs without them, slower; "
            f"torch and triton must fit this GPU and its driver: {_reinstall(here)}"
        )
    if here.apt:
        return f"Triton compiles what starts a kernel: {here.apt} gcc libc6-dev"
    if here.modules:
        return (
            "Triton compiles what starts a kernel: module load gcc, also in the job's site file, "
            "or ask for such a module"
        )
    return "Triton compiles what starts a kernel: put gcc or clang on the PATH, or name it in CC"


def _tracking(detail: str) -> str:
    if "it must be" in detail or "holds a password" in detail:
        return "correct tracking.uri"
    if re.search(r"\b40[13]\b", detail):
        return (
            "name and password go into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or ~/.mlflow/credentials"
        )
    if "sqlite" in detail:
        return (
            "name a file in a writable folder on a disk of this machine: "
            "tracking.uri=sqlite:///FILE"
        )
    return (
        "start the server (`coda serve`) or correct the address; "
        "training runs without it, and `coda sync` sends what is missing"
    )
