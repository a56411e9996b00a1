"""A profile of what this machine's processor can do, measured once and kept."""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.caches import use_local_caches
from pipeline.files import write_atomically
from pipeline.planning.dry_run import Operation, trace

# A convolution with fewer input channels is a narrow one, such as a stem.
NARROW = 8
CONVOLUTION_WIDTHS = (16, 32, 64, 128, 256, 512)
PRODUCT_SIZES = (8, 16, 32, 64, 128, 512)
# glibc gives blocks of more than 32 MiB back at once.
MAP_BYTES = (2**16, 2**20, 2**22, 2**23, 2**24, 30 * 2**20, 36 * 2**20, 2**27)


@dataclass(frozen=True)
class CPUProfile:
    """Measured rates of a processor."""

    about: str
    """The processor, the number of threads and torch's version."""
    curves: Mapping[str, Sequence[tuple[float, float]]]
    """Points (size, rate) by the name of a curve."""

    def at(self, curve: str, size: float) -> float:
        """Read the rate of ``curve`` at ``size``.

        Between two points it is on a straight line on logarithmic scales, and beyond the ends
        constant.
        """
        sizes, rates = np.log(np.array(self.curves[curve])).T
        return float(np.exp(np.interp(np.log(max(size, 1)), sizes, rates)))

    @property
    def start(self) -> float:
        """Seconds that an operation takes which does next to nothing."""
        return 1 / self.curves["starts"][0][1]

    def seconds(self, operation: Operation) -> float:
        """Time of ``operation`` within a step."""
        return self._alone(operation) / self.curves["in sequence"][0][1]

    def _alone(self, operation: Operation) -> float:
        start = self.start
        way = "backward" if operation.backward else "forward"
        written = operation.written
        if operation.kind == "convolution":
            channels, units, area = operation.shape
            wide = "3x3" if area > 1 else "1x1"
            curve = f"convolution {'narrow' if channels < NARROW else wide} {way}"
            return start + operation.multiply_adds / self.at(curve, (channels * units) ** 0.5)
        if operation.kind == "product":
            return start + operation.multiply_adds / self.at("product", min(operation.shape))
        if operation.kind in ("normalisation", "pooling"):
            return start + operation.bytes / self.at(f"{operation.kind} {way}", written)
        if operation.kind == "copy":
            curve = "copy"
        else:
            curve = "elementwise new" if operation.fresh else "elementwise in place"
        return start + operation.bytes / self.at(curve, written)


def cpu_profile(folder: Path | None = None) -> CPUProfile:
    """Read the profile of this machine with the present number of threads, or measure it.

    It is measured in about a minute, and kept in ``folder``: by default that of all caches.
    """
    folder = folder or use_local_caches()
    about = f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    path = folder / f"cpu-{hashlib.sha256(about.encode()).hexdigest()[:12]}.json"
    if path.exists():
        return CPUProfile(about, json.loads(path.read_text()))
    profile = CPUProfile(about, measure_cpu())
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(profile.curves, indent=1).encode())
    return profile


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure_cpu(rounds: int = 3) -> dict[str, list[tuple[float, float]]]:
    """Measure all curves: the best of some ``rounds``.

    The rates of convolutions and products are in multiply-adds, all others in bytes, per second.
    Another process that runs for a while disturbs one round, and not all.
    """
    measured = [_curves() for _ in range(rounds)]
    best = {
        name: [max(points) for points in zip(*(curves[name] for curves in measured), strict=True)]
        for name in measured[0]
    }
    alone = CPUProfile("", {**best, "in sequence": [(1.0, 1.0)]})
    return {**best, "in sequence": [(1.0, _in_sequence(alone))]}


def _in_sequence(profile: CPUProfile) -> float:
    """Measure how fast operations are that follow each other.

    The speed is relative to that of the same operations by themselves, whose operands stay in the
    caches. It is measured on one step of timm's ResNet-10 with 16 images of 64x64 pixels, for all
    models.
    """
    model = timm.create_model("resnet10t", num_classes=10)
    images = torch.rand(16, 3, 64, 64)
    work = trace(_on_meta(), (3, 64, 64), 16, fused=False)
    alone = sum(profile.seconds(operation) for operation in work.operations)
    return alone / _seconds(lambda: model.train()(images).sum().backward(), least=1.0)


def _on_meta() -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model("resnet10t", num_classes=10)


def _curves() -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    tiny = torch.ones(4)
    curves["starts"] = [(1.0, 1 / _seconds(lambda: tiny.add(tiny)))]
    for name, kernel in (("3x3", 3), ("1x1", 1)):
        for width in CONVOLUTION_WIDTHS:
            _add_convolution(curves, name, width, width, kernel)
    for width in (16, 64):
        _add_convolution(curves, "narrow", NARROW - 2, width, 3)
    for size in PRODUCT_SIZES:
        left, right = torch.rand(2048, size), torch.rand(size, 512)
        out = torch.empty(2048, 512)
        seconds = _seconds(partial(torch.mm, left, right, out=out))
        curves.setdefault("product", []).append((size, 2048 * size * 512 / seconds))
    for count in MAP_BYTES:
        for name, rate in _passes(count).items():
            curves.setdefault(name, []).append((count, rate))
    return curves


def _add_convolution(
    curves: dict[str, list[tuple[float, float]]], name: str, channels: int, units: int, kernel: int
) -> None:
    """Measure a convolution, and add a point to the curves "convolution ``name`` ..."."""
    forward, backward = _convolution(channels, units, kernel)
    size = (channels * units) ** 0.5
    curves.setdefault(f"convolution {name} forward", []).append((size, forward))
    curves.setdefault(f"convolution {name} backward", []).append((size, backward))


def _convolution(channels: int, units: int, kernel: int) -> tuple[float, float]:
    """Measure a convolution on maps of about a million values, sized as in ResNets.

    Returns:
        Multiply-adds per second, forward and backward.
    """
    side = min(32 if units < 64 else 56, 3584 // units)
    x = torch.rand(2**20 // units // side**2, channels, side, side, requires_grad=True)
    weight = torch.rand(units, channels, kernel, kernel, requires_grad=True)
    y = functional.conv2d(x, weight, padding=kernel // 2)
    gradient = torch.rand_like(y)
    work = y.numel() * weight[0].numel()
    forward = _seconds(lambda: functional.conv2d(x, weight, padding=kernel // 2))
    backward = _seconds(lambda: torch.autograd.grad(y, (x, weight), gradient, retain_graph=True))
    return work / forward, 2 * work / backward


def _passes(count: int) -> dict[str, float]:
    """Measure the bytes per second of passes over maps of ``count`` bytes with 16 channels."""
    x = torch.rand(count // 2**16, 16, 32, 32)
    y, size = torch.rand_like(x), x.numel() * 4
    scale, shift = torch.ones(16, requires_grad=True), torch.zeros(16, requires_grad=True)
    leaf = x.clone().requires_grad_()
    normalised = functional.batch_norm(leaf, None, None, scale, shift, training=True)
    pooled = functional.max_pool2d(leaf, 3, 2, 1)
    gradient, of_pooled = torch.rand_like(x), torch.rand_like(pooled)

    def normalise() -> Tensor:
        return functional.batch_norm(x, None, None, scale, shift, training=True)

    def normalise_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(normalised, leaf, gradient, retain_graph=True)

    def pool_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(pooled, leaf, of_pooled, retain_graph=True)

    return {
        "elementwise new": 3 * size / _seconds(lambda: x + y),
        "elementwise in place": 3 * size / _seconds(lambda: x.mul_(y)),
        "copy": 2 * size / _seconds(lambda: x.permute(0, 2, 3, 1).contiguous()),
        "normalisation forward": 2 * size / _seconds(normalise),
        "normalisation backward": 3 * size / _seconds(normalise_backward),
        "pooling forward": 1.75 * size / _seconds(lambda: functional.max_pool2d(x, 3, 2, 1)),
        "pooling backward": 2.75 * size / _seconds(pool_backward),
    }


def _seconds(run: Callable[[], object], least: float = 0.1) -> float:
    """Measure the wall time of one ``run``.

    It is the best of five or more, as many as take ``least`` seconds, after one to warm up.
    """
    run()
    times: list[float] = []
    while len(times) < 5 or sum(times) < least:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
