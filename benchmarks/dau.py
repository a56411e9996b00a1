"""Time and memory of the DAU layer against its slow twin, which forms every dynamic weight.

    python -m benchmarks.dau

One run, interleaved, medians; memory in a process of its own for each measurement. The floor of a
step is three matrix products of 2 N d (r + 1) O operations per layer, at the rate of a 2048 x 2048
product measured between the repetitions.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

# Registers the models.
import pipeline  # noqa: F401
from pipeline.interpret.contributions import layer_contributions
from pipeline.models.dau import DAUConv2d
from pipeline.models.dau.reference import twin

# (batch, resolution) by name.
MODELS = {"coda_s": (16, 32), "coda_l": (1, 240)}
# Factors of the sizes of one layer, by what grows.
GROWTH = {
    "as it is": {},
    "batch x 2": {"batch": 2},
    "batch x 4": {"batch": 4},
    "height x 2": {"height": 2},
    "height x 4": {"height": 4},
    "rank x 2": {"rank": 2},
    "units x 2": {"units": 2},
}


class Twin(nn.Module):
    """A DAU layer that computes as its twin does."""

    def __init__(self, layer: DAUConv2d):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output of the layer."""
        return twin(self.layer, x)


def with_twins(model: nn.Module) -> nn.Module:
    """Replace every DAU layer of ``model`` by its twin, which shares the parameters."""
    for name, child in model.named_children():
        setattr(model, name, Twin(child) if isinstance(child, DAUConv2d) else with_twins(child))
    return model


def make(name: str, twins: bool) -> tuple[nn.Module, Tensor]:
    """Build a model, with twins or without, and a batch of images for it."""
    torch.manual_seed(0)
    batch, size = MODELS[name]
    model = timm.create_model(name)
    return with_twins(model) if twins else model, torch.rand(batch, 3, size, size)


def training_step(module: nn.Module, x: Tensor) -> None:
    """Run a forward and a backward pass."""
    module.zero_grad(set_to_none=False)
    module(x).sum().backward()


def medians(tasks: dict[str, Callable[[], None]], repeats: int, title: str) -> dict[str, float]:
    """Measure the seconds of each task, medians of ``repeats`` rounds.

    A task runs twice in its turn, and the second run is timed. So it follows its own kind, as a
    training step does, and does not pay for the caches and the heap that another task has left.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    # The first round warms up.
    for _ in tqdm(range(repeats + 1), desc=title, file=sys.stderr):
        for name, task in tasks.items():
            task()
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def sgemm() -> Callable[[], None]:
    """Make a task of one 2048 x 2048 matrix product."""
    a, b, out = torch.rand(2048, 2048), torch.rand(2048, 2048), torch.empty(2048, 2048)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    return multiply


def record_layers(model: nn.Module, x: Tensor) -> list[tuple[DAUConv2d, Tensor, int]]:
    """List every DAU layer with its input and number of positions, in order of execution."""
    found: list[tuple[DAUConv2d, Tensor, int]] = []
    with torch.no_grad(), ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, DAUConv2d):
                hook = module.register_forward_hook(
                    lambda layer, inputs, y: found.append(
                        (layer, inputs[0].clone(), y[:, 0].numel())
                    )
                )
                hooks.callback(hook.remove)
        model(x)
    return found


def products(layer: DAUConv2d, positions: int) -> float:
    """Count the operations of one pass, 2 N d (r + 1) O."""
    units, values, rank = layer.up_weight.shape
    return 2.0 * positions * values * (rank + 1) * units


def time_steps(name: str, repeats: int) -> None:
    """Print the times of a model's training step and of each layer's, against the twin."""
    model, x = make(name, twins=False)
    layers = record_layers(make(name, twins=False)[0], x)
    slow, _ = make(name, twins=True)
    tasks: dict[str, Callable[[], None]] = {
        "twin": partial(training_step, slow, x),
        "ours": partial(training_step, model, x),
        "sgemm": sgemm(),
    }
    seconds = medians(tasks, repeats, name)
    rate = 2 * 2048**3 / seconds["sgemm"]
    floor = 3 * sum(products(layer, positions) for layer, _, positions in layers) / rate
    print(
        f"\n### {name}, batch {len(x)}, {x.shape[-1]}x{x.shape[-1]}: forward and backward "
        f"(sgemm {rate / 1e9:.0f} GF/s)\n"
    )
    print("| layer | d | r | units | positions | twin ms | ours ms | ratio | of the floor |")
    print("|---|---|---|---|---|---|---|---|---|")
    for index, (layer, inputs, positions) in enumerate(layers):
        # Training does not need the gradient of an image.
        inputs.requires_grad_(index > 0)
        tasks = {
            "twin": partial(training_step, Twin(layer), inputs),
            "ours": partial(training_step, layer, inputs),
            "sgemm": sgemm(),
        }
        one = medians(tasks, repeats, f"{name}, layer {index + 1}")
        share = 3 * products(layer, positions) / (2 * 2048**3 / one["sgemm"]) / one["ours"]
        units, values, rank = layer.up_weight.shape
        print(
            f"| {index + 1} | {values} | {rank} | {units} | {positions} "
            f"| {1e3 * one['twin']:.1f} | {1e3 * one['ours']:.1f} "
            f"| {one['twin'] / one['ours']:.1f} | {share:.2f} |",
            flush=True,
        )
    print(
        f"| **step** | | | | | {1e3 * seconds['twin']:.0f} | {1e3 * seconds['ours']:.0f} "
        f"| **{seconds['twin'] / seconds['ours']:.2f}** | **{floor / seconds['ours']:.2f}** |",
        flush=True,
    )


def time_explanation(repeats: int) -> None:
    """Print the times of contributions against a forward pass."""
    model, x = make("coda_s", twins=False)
    targets = 9

    def explain(count: int) -> None:
        classes = torch.arange(count).expand(len(x), -1)
        layer_contributions(model, x, classes, [None], sum_channels=True)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    seconds = medians(
        {"forward": forward, "one": lambda: explain(1), "all": lambda: explain(targets)},
        repeats,
        "explanation",
    )
    more = (seconds["all"] - seconds["one"]) / (targets - 1) / seconds["forward"]
    print(f"\n### Explanation mode, coda_s, batch {len(x)}\n")
    print(
        f"Forward pass {1e3 * seconds['forward']:.0f} ms; "
        f"with one target {seconds['one'] / seconds['forward']:.2f} times that, "
        f"each target beyond the first {more:.2f} times.",
        flush=True,
    )


def peak(task: str) -> None:
    """Print the MiB that a step holds beyond the weights, their gradients and the input.

    It must run in a process of its own.

    Args:
        task: kind ("twin" or "ours"), then a model's name, or "layer" and names and values of the
            factors of its sizes; separated by commas.
    """
    kind, name, *factors = task.split(",")
    if name in MODELS:
        module, x = make(name, kind == "twin")
    else:
        module, x = growth_layer(dict(zip(factors[::2], map(int, factors[1::2]), strict=True)))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    # The library makes its own buffers.
    torch.mm(torch.rand(64, 64), torch.rand(64, 64))
    # The peak starts again from here; getrusage's would include the parent's.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    training_step(module, x)
    print((resident("VmHWM") - before) / 1024)


def resident(kind: str) -> int:
    """Read the KiB of this process: "VmRSS" now, "VmHWM" at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{kind}:"))
    return int(line.split()[1])


def measure_peak(task: str) -> float:
    """Run :func:`peak` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.dau", "--peak", task]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory() -> None:
    """Print the peak memory of each model's training step, against the twin."""
    print("\n### Peak memory of a step beyond weights, gradients and input\n")
    print("| model | twin MiB | ours MiB | ratio |\n|---|---|---|---|")
    for name in MODELS:
        slow, ours = measure_peak(f"twin,{name}"), measure_peak(f"ours,{name}")
        print(f"| {name} | {slow:.0f} | {ours:.0f} | **{slow / ours:.1f}** |", flush=True)


def growth_layer(factors: dict[str, int]) -> tuple[nn.Module, Tensor]:
    """Build a layer and an input whose sizes are multiplied by ``factors``."""
    torch.manual_seed(0)
    sizes = dict(batch=8, height=32, rank=32, units=32)
    sizes |= {name: sizes[name] * factor for name, factor in factors.items()}
    layer = DAUConv2d(32, sizes["units"], 3, padding=1, rank=sizes["rank"])
    return layer, torch.rand(sizes["batch"], 32, sizes["height"], 32, requires_grad=True)


def growth(repeats: int) -> None:
    """Print how time and memory of a layer grow with its sizes."""
    tasks: dict[str, Callable[[], None]] = {}
    for name, factors in GROWTH.items():
        layer, x = growth_layer(factors)
        tasks[name] = partial(training_step, layer, x)
    seconds = medians(tasks, repeats, "growth")
    print("\n### Growth of one layer (8 images 32x32, 32 to 32 channels, 3x3, rank 32)\n")
    print("| what grows | time | peak MiB |\n|---|---|---|")
    for name, factors in GROWTH.items():
        flat = [str(item) for pair in factors.items() for item in pair]
        ratio = seconds[name] / seconds["as it is"]
        mebibytes = measure_peak(",".join(["ours", "layer", *flat]))
        print(f"| {name} | {ratio:.2f} | {mebibytes:.0f} |", flush=True)


def main() -> None:
    """Print all tables, or measure one peak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        peak(arguments.peak)
        return
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, {versions}")
    for name in MODELS:
        time_steps(name, arguments.repeats)
    time_explanation(arguments.repeats)
    memory()
    growth(arguments.repeats)


if __name__ == "__main__":
    main()
