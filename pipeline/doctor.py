"""``coda doctor``: try every building block on this machine, and say what to do about the ones that fail.

Each check does the real thing in small (a compilation, a written and read data file, an all-reduce, a tracked run).
Whatever is native, slow or may hang runs in a process of its own that is killed when its time is up.
"""

import contextlib
import importlib.metadata
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from pipeline.files import NETWORK_FILE_SYSTEMS, file_system

_APT = "apt-get install libopencv-dev libturbojpeg0-dev pkg-config build-essential python3-dev"
_OLDEST_PYTHON = (3, 11)
_SECONDS = 180.0  # for one check; the imports alone take tens of seconds on a busy machine or a slow file system
_RUN_BYTES = 5e9  # checkpoints, export and pictures of a run
_SHM_BYTES = 5e8  # containers often have 64 MB, which NCCL and the workers of FFCV's writer can exceed


class Check(NamedTuple):
    """Outcome of one check."""

    name: str
    ok: bool
    detail: str  # what was found, or why it failed
    remedy: str


def main(folder: Path) -> int:
    """Print a line per check as it finishes; 0 if all are well, else 2."""
    code = 0
    for check in checks(folder):
        print(f"{'ok' if check.ok else 'FAILED':8}{check.name}: {check.detail}", flush=True)
        if not check.ok:
            print(f"{'':8}-> {check.remedy}", flush=True)
            code = 2
    return code


def checks(folder: Path) -> Iterator[Check]:
    """All checks, one after another; runs would be written below ``folder``, which need not exist yet."""
    isolated: list[tuple[str, Callable[[], str], str]] = [
        ("ffcv", _ffcv, f"{_APT}, then reinstall ffcv: pip install --force-reinstall --no-deps --no-cache-dir ffcv"),
        ("process group", _gloo, "allow TCP connections on the loopback interface; `getent hosts $(hostname)` must answer"),
        ("nccl", _nccl, "run again with NCCL_DEBUG=INFO; in a job ask for --gpus-per-node and --gpu-bind=none"),
        ("deepspeed", _deepspeed, "pip install deepspeed"),
        ("mlflow", _mlflow, "pip install mlflow, and make sure that the temporary folder (TMPDIR) can be written"),
    ]
    yield _check("python", _python, f"install Python {'.'.join(map(str, _OLDEST_PYTHON))} or newer")
    yield _check("compiler", _compiler, _APT)
    yield _check("libraries", _libraries, _APT)
    yield _check("processors", _processors, "in a Slurm job: srun --cpus-per-task=8 (srun does not inherit it from sbatch)")
    yield _check("runs folder", partial(_room, folder, _RUN_BYTES), "choose a writable folder with room: runs=FOLDER")
    yield _check("/dev/shm", partial(_room, Path("/dev/shm"), _SHM_BYTES), "start the container with --shm-size=8g (docker) or --ipc=host")
    yield _check("torch", _torch, "pip install torch; with GPUs, a build for the driver's CUDA version")
    for name, probe, remedy in isolated:
        yield _check(name, partial(_isolated, probe), remedy)


def _check(name: str, probe: Callable[[], str], remedy: str) -> Check:
    try:
        return Check(name, True, probe(), remedy)
    except Exception as error:  # a failure of any kind is what this reports
        return Check(name, False, " ".join(f"{type(error).__name__}: {error}".split())[:400], remedy)


def _isolated(probe: Callable[[], str]) -> str:
    """The answer of a picklable function from a fresh process; outlives its crash and its hang, and leaves no children of it."""
    context = multiprocessing.get_context("forkserver")  # clean of this process's threads and devices, yet quick after the first
    context.set_forkserver_preload(["pipeline.doctor"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, probe))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_SECONDS):
            raise TimeoutError(f"no answer within {_SECONDS:g} s")
        ok, text = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process died with code {process.exitcode}") from None
    finally:
        process.kill()
        if process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
    if not ok:
        raise RuntimeError(text)
    return text


def _answer(sender: Connection, probe: Callable[[], str]) -> None:
    os.setsid()  # so that all children can be killed with this process
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        sender.send((True, probe()))
    except Exception as error:
        sender.send((False, f"{type(error).__name__}: {error}"))


def _python() -> str:
    if sys.version_info < _OLDEST_PYTHON:
        raise RuntimeError(f"{sys.version.split()[0]} is too old")
    return sys.version.split()[0]


def _compiler() -> str:
    program = os.environ.get("CXX", "c++")
    if not shutil.which(program):
        raise FileNotFoundError(f"no {program} on the PATH")
    source = "#include <Python.h>\n#include <vector>\nint main() { return std::vector<int>().size(); }\n"
    _run(program, "-x", "c++", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-", text=source)
    return _run(program, "--version").splitlines()[0]


def _libraries() -> str:
    names = ("opencv4", "libturbojpeg")
    return ", ".join(f"{name} {_run('pkg-config', '--modversion', name).strip()}" for name in names)


def _run(*command: str, text: str = "") -> str:
    answer = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    if answer.returncode:
        raise RuntimeError(answer.stderr.strip() or f"{command[0]} ended with code {answer.returncode}")
    return answer.stdout


def _torch() -> str:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    for index in range(len(devices)):
        torch.ones(8, device=f"cuda:{index}").sum().item()
    return f"{torch.__version__}, {', '.join(devices) or 'CPU only'}"


def _ffcv() -> str:
    """Four images written and read back."""
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor
    from ffcv.writer import DatasetWriter

    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "four.beton")
        writer = DatasetWriter(path, {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=1)
        writer.from_indexed_dataset(list(zip(images, range(4), strict=True)))
        pipelines = {"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]}
        loader = Loader(path, 4, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines)
        ((read, labels),) = [(image.numpy().copy(), label.flatten().tolist()) for image, label in loader]
    if not np.array_equal(read, images) or labels != [0, 1, 2, 3]:
        raise RuntimeError("the images read differ from those written")
    return f"{importlib.metadata.version('ffcv')}, 4 images written and read"


def _gloo() -> str:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return f"gloo, {_all_reduce(2, 'fork')}"


def _nccl() -> str:
    import torch

    devices = torch.cuda.device_count()
    return f"nccl, {_all_reduce(devices, 'spawn')}" if devices > 1 else "not needed: fewer than two GPUs"


def _all_reduce(size: int, start_method: str) -> str:
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(_sum_of_ranks, (size, port), nprocs=size, start_method=start_method)
    return f"{size} processes on {socket.gethostname()} summed a tensor"


def _sum_of_ranks(rank: int, size: int, port: int) -> None:
    import torch

    from pipeline.distributed import process_group, sum_across_ranks

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with process_group(timeout_seconds=60) as world:
        total = sum_across_ranks(torch.tensor([float(rank)], device=world.device)).item()
    if total != size * (size - 1) / 2:
        raise RuntimeError(f"the sum of the ranks of {size} processes came out as {total}")


def _deepspeed() -> str:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    return f"{deepspeed.__version__} on {deepspeed.get_accelerator().device_name()}"


def _mlflow() -> str:
    """A run with one metric in a temporary store."""
    from pipeline.tracking.sender import mlflow_client

    with tempfile.TemporaryDirectory() as folder:
        client = mlflow_client(f"sqlite:///{folder}/mlflow.db")
        run = client.create_run(client.create_experiment("doctor", folder)).info.run_id
        client.log_metric(run, "val/top1", 0.5, step=1, synchronous=True)
        ((value, step),) = [(row.value, row.step) for row in client.get_metric_history(run, "val/top1")]
    if (value, step) != (0.5, 1):
        raise RuntimeError(f"logged 0.5 at step 1, read {value} at step {step}")
    return f"{importlib.metadata.version('mlflow')}, a run in SQLite written and read"


def _room(folder: Path, needed: float) -> str:
    """Try to write where ``folder`` is or would be made, and see that ``needed`` bytes are free there."""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    with tempfile.TemporaryFile(dir=existing) as file:
        file.write(b"coda")
        file.flush()
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(f"{existing} has {free / 1e9:.1f} GB free, fewer than {needed / 1e9:.1f} GB")
    system = file_system(existing)
    warning = "; SQLite's locks are not safe there: tracking.uri=http://HOST:PORT" if system in NETWORK_FILE_SYSTEMS else ""
    return f"{existing} ({system}) is writable, {free / 1e9:.0f} GB free{warning}"


def _processors() -> str:
    usable = len(os.sched_getaffinity(0))
    if usable < 2:
        raise RuntimeError(f"this process may use 1 of {os.cpu_count()}: too few to load images beside training")
    return f"this process may use {usable} of {os.cpu_count()}"
