"""Probes of packages: they do in small what a training run does.

Each runs in a process of its own, returns what it found, and raises what is wrong.
"""

import importlib.metadata
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pipeline.recipe.schema import Recipe

RENDEZVOUS_SECONDS = 20.0
# Of planted images: pixels, grey levels from one pixel to the next, and levels that a JPEG may err.
SIDE = 64
SLOPE = 3
TOLERANCE = 2


def process_group_of_two() -> str:
    """Two processes of this machine sum a tensor, on its processor."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return f"gloo, {_all_reduce(2, 'fork')}"


def gpu() -> str:
    """Every GPU that torch sees computes a sum."""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    for index in range(len(names)):
        torch.ones(8, device=f"cuda:{index}").sum().item()
    if names:
        return f"{len(names)} x {', '.join(dict.fromkeys(names))}"
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"none, as CUDA_VISIBLE_DEVICES is {hidden!r}: training runs on the processor"
    if listed := _nvidia_smi():
        raise RuntimeError(
            f"nvidia-smi lists {listed[0]}, "
            f"but torch {torch.__version__} sees none: {_why_no_gpu()}"
        )
    if Path("/proc/driver/nvidia/gpus").exists():
        return (
            "none, though the machine has some: in a container --nv (apptainer) or "
            "--gpus all (docker) shows them, in a job --gpus-per-node"
        )
    return "none: training runs on the processor"


def _nvidia_smi() -> list[str]:
    program = shutil.which("nvidia-smi")
    answer = subprocess.run([program, "-L"], capture_output=True, text=True) if program else None
    if not answer or answer.returncode:
        return []
    return [line for line in answer.stdout.splitlines() if line.startswith("GPU ")]


def _why_no_gpu() -> str:
    import torch

    if not torch.version.cuda:
        return "it is built for the processor"
    try:
        torch.ones(1, device="cuda")
    except RuntimeError as error:
        return str(error)
    return "no reason given"


def nccl() -> str:
    """All GPUs of this machine sum a tensor, one process each."""
    import torch

    devices = torch.cuda.device_count()
    if devices < 2:
        return "not needed: fewer than two GPUs"
    return f"nccl, {_all_reduce(devices, 'spawn')}"


def _all_reduce(size: int, start_method: str) -> str:
    from torch.multiprocessing.spawn import start_processes

    _stand_alone()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start: Callable[..., object] = start_processes
    start(_sum_of_ranks, (size, port), nprocs=size, start_method=start_method)
    return f"{size} processes on {socket.gethostname()} summed a tensor"


def _sum_of_ranks(rank: int, size: int, port: int) -> None:
    import torch

    from pipeline.distributed import process_group, sum_across_ranks

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with process_group(RENDEZVOUS_SECONDS) as world:
        total = sum_across_ranks(torch.tensor([float(rank)], device=world.device)).item()
    if total != size * (size - 1) / 2:
        raise RuntimeError(f"the sum of the ranks of {size} processes came out as {total}")


def deepspeed() -> str:
    """An engine as a training run builds it makes one update of a tiny network."""
    import torch

    from pipeline.distributed import process_group
    from pipeline.training.engine import build_engine
    from pipeline.training.optim import build_optimizer

    _stand_alone()
    recipe = smallest_recipe(
        name="doctor", training={"epochs": 1, "global_batch_size": 4, "learning_rate": 0.1}
    )
    with process_group(RENDEZVOUS_SECONDS) as world:
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        engine = build_engine(recipe, model, build_optimizer(model, recipe.training), world)
        loss = engine(torch.rand(4, 3, 2, 2, device=world.device)).float().square().mean()
        engine.backward(loss)
        engine.step()
        after = [parameter.detach().cpu() for parameter in engine.module.parameters()]
    unchanged = all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    if unchanged or not torch.isfinite(loss):
        raise RuntimeError(f"an update with the loss {loss.item()} left the weights as they were")
    return f"{importlib.metadata.version('deepspeed')}, an engine made an update on {world.device}"


def _stand_alone() -> None:
    """Forget torchrun's and srun's variables: the other processes of theirs are not here."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*names, "TORCHELASTIC_USE_AGENT_STORE", "SLURM_STEP_ID"):
        os.environ.pop(name, None)


def smallest_recipe(**changes: Any) -> "Recipe":
    """A valid recipe, with ``changes`` of its sections."""
    from pipeline.recipe.load import from_dict

    model = {"name": "coda_s", "args": {"rank": 2}}
    training = {"epochs": 1, "global_batch_size": 1, "learning_rate": 0.1}
    data = {"source": "digits", "image_size": 8}
    return from_dict({"model": model, "data": data, "training": training, **changes})


def kernels() -> str:
    """The fused kernels of the layer agree with plain PyTorch, if there is a GPU.

    A training run checks the same before it uses them.
    """
    import torch

    from pipeline.models.dau import fused, kernels

    if not torch.cuda.is_available():
        return "not needed: no GPU"
    name, device = torch.cuda.get_device_name(0), torch.device("cuda", 0)
    for dtype in fused.DTYPES:
        if reason := fused.self_check(device, dtype, kernels.reference):
            raise RuntimeError(
                f"the fused kernels are not used on {name}, but plain PyTorch: {reason}"
            )
    return f"the fused kernels agree with plain PyTorch on {name}"


def ffcv() -> str:
    """Planted images are prepared as JPEG, and loaded, cropped and resized as for an evaluation.

    Their right pixels are known.
    """
    import numpy as np
    from PIL import Image

    from pipeline.data.loaders import eval_loader
    from pipeline.data.prepare import prepare
    from pipeline.data.prepared import open_prepared
    from pipeline.distributed import World

    planted = _planted_images()
    with tempfile.TemporaryDirectory(prefix="coda-doctor-") as folder:
        for number, image in enumerate(planted * 2):
            split = "val" if number < len(planted) else "train"
            path = Path(folder, "images", split, "class", f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        # Half of the part that a central crop leaves.
        size = SIDE * 7 // 16
        data = {
            "source": "imagefolder",
            "path": f"{folder}/images",
            "prepared": folder,
            "image_size": size,
            "max_resolution": SIDE,
            "write_mode": "jpg",
            "workers": min(2, len(os.sched_getaffinity(0))),
        }
        recipe = smallest_recipe(name="doctor", data=data)
        prepare(recipe)
        with eval_loader(recipe, open_prepared(recipe.data), World(), len(planted)).epoch(
            0
        ) as batches:
            (loaded,) = [batch.images.permute(0, 2, 3, 1).numpy().copy() for batch in batches]
    margin = (SIDE - 2 * size) // 2
    crops = [image[margin:-margin, margin:-margin] for image in planted]
    # Right is the mean of 2 x 2 pixels.
    right = [crop.reshape(size, 2, size, 2, 3).mean((1, 3)) for crop in crops]
    error = np.abs(loaded - np.stack(right)).max()
    if error > TOLERANCE:
        raise RuntimeError(
            "a decoded and resized image differs from the right one "
            f"by {error:g} of 255 grey levels"
        )
    return (
        f"{importlib.metadata.version('ffcv')}, {len(planted)} JPEG images written, "
        f"decoded and resized, right within {error:g} of 255"
    )


def _planted_images() -> "list[npt.NDArray[np.uint8]]":
    """A colour, and ramps across and down: they show exchanged channels, sides, single pixels."""
    import numpy as np

    colour = np.empty((SIDE, SIDE, 3), np.uint8)
    colour[:] = (200, 100, 50)
    across = np.empty((SIDE, SIDE, 3), np.uint8)
    across[:] = (SLOPE * np.arange(SIDE))[None, :, None]
    return [colour, across, np.ascontiguousarray(across.transpose(1, 0, 2))]
