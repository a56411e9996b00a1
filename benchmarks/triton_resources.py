"""Resources of the DAU's Triton kernels, compiled for sm_80 and sm_90 without a GPU.

The output is the tables of docs/triton.md: registers, spills, roofline.

    python -m benchmarks.triton_resources > tables.md

Nothing here measures speed. The roofline divides the operations and the least memory traffic of a
layer by published rates of an H100 SXM (NVIDIA H100 data sheet, dense): it bounds the time from
below.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.models.dau import fused_kernels
from pipeline.models.dau.launches import Launch, launches

# What Triton has ptxas compile for, by compute capability.
ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
# Bytes of shared memory that a program may use on any device from sm_80 on: the limit of sm_86 and
# sm_89, below the 163 and 227 KiB of sm_80 and sm_90.
SHARED_MEMORY = 99 * 1024
# Operand type and precision of the products, by the name in the tables.
KINDS = {"fp32": ("fp32", "tf32x3"), "TF32": ("fp32", "tf32"), "bf16": ("bf16", "tf32")}
# Arguments that are fp32 whatever the operands are.
ALWAYS_FP32 = {"dot", "norm2", "scale", "out"}
# Operations per second; three TF32 products make one of fp32 accuracy.
H100 = {"fp32": 495e12 / 3, "TF32": 495e12, "bf16": 989e12}
# Bytes per second.
H100_BANDWIDTH = 3.35e12


@dataclass(frozen=True)
class Layer:
    """The sizes of a DAU layer."""

    name: str
    """As the tables call it."""
    positions: int
    """Positions of one image."""
    values: int
    """Values of a patch, D."""
    rank: int
    """R."""
    units: int
    """O."""


def l_coda() -> list[Layer]:
    """List the nine layers of the official L-CoDA at 240 x 240."""
    units = [16, 32, 32, 64, 64, 64, 64, 64, 100]
    ranks = [64, 64, 64, 128, 128, 128, 256, 256, 256]
    return _chain(
        "L-CoDA", 240, [7, *[3] * 8], [3, 1, 1, 2, 1, 1, 2, 1, 1], [3, *[1] * 8], units, ranks
    )


def s_coda() -> list[Layer]:
    """List the nine layers of the official S-CoDA at 32 x 32."""
    units, ranks = [16, 16, 32, 32, 32, 64, 64, 64, 10], [32, 32, *[64] * 7]
    return _chain(
        "S-CoDA", 32, [*[3] * 8, 1], [1, 1, 2, 1, 1, 2, 1, 1, 1], [*[1] * 8, 0], units, ranks
    )


def _chain(
    name: str,
    size: int,
    kernels: list[int],
    strides: list[int],
    paddings: list[int],
    units: list[int],
    ranks: list[int],
) -> list[Layer]:
    layers, channels = [], 6
    for i, (kernel, stride, padding) in enumerate(zip(kernels, strides, paddings, strict=True)):
        size = (size + 2 * padding - kernel) // stride + 1
        layers.append(
            Layer(f"{name} {i + 1}", size * size, channels * kernel**2, ranks[i], units[i])
        )
        channels = units[i]
    return layers


def hybrids() -> list[Layer]:
    """List layers of hybrids: wide 1x1 and 3x3 ones of low and high rank, and a classifier."""
    wide = [Layer(f"hybrid 3x3 rank {rank}", 196, 256 * 9, rank, 256) for rank in (8, 16, 32, 64)]
    return [
        *wide,
        Layer("hybrid 1x1 rank 128", 49, 2048, 128, 512),
        Layer("hybrid classifier", 49, 512, 256, 1000),
    ]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses."""

    registers: int
    """Registers of a thread."""
    spilled: int
    """Bytes that spills store and load."""
    shared: int
    """Bytes of shared memory of a program."""


def compile_launch(
    launch: Launch, operand: str, capability: int, bias: bool = True, norm: bool = True
) -> Resources:
    """Compile as the just-in-time compiler would for 16-byte aligned tensors.

    Args:
        launch: what to compile.
        operand: "fp32" or "bf16".
        capability: of the device, a key of ``ARCHITECTURES``.
        bias: whether the layer has one.
        norm: whether norm2 is wanted.
    """
    kernel = getattr(fused_kernels, launch.kernel)
    absent = {
        name: None
        for name, present in (("bias", bias), ("norm2", norm))
        if name in kernel.arg_names and not present
    }
    constants = {**launch.constants, **absent}
    signature, alignment = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("positions", "span"):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32" if name in ALWAYS_FP32 else f"*{operand}"
            alignment[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, alignment)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=launch.options
    )
    report = _assemble(compiled.asm["ptx"], ARCHITECTURES[capability])
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", report))
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None
    return Resources(int(registers[1]), spilled, compiled.metadata.shared)


def _assemble(ptx: str, architecture: str) -> str:
    """Assemble ``ptx`` by the ptxas that Triton ships, and return its report."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name={architecture}",
            str(source),
            "-o",
            str(source.with_suffix(".cubin")),
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def launches_of(layer: Layer, kind: str, batch: int = 64) -> Iterator[tuple[str, Launch, str]]:
    """Yield (purpose, launch, operand type) of everything a layer launches in training.

    The norm part always has fp32 operands.
    """
    operand, precision = KINDS[kind]
    positions = batch * layer.positions
    plan = launches(positions, layer.values, layer.rank, layer.units, precision)
    for purpose, launch in plan.items():
        yield purpose, launch, "fp32" if purpose.endswith("of norm2") else operand


def resource_table(layers: list[Layer], failures: list[str]) -> Iterator[str]:
    """Yield the lines of the table, with a cell "registers, KiB" for each architecture.

    Launches that spill or exceed ``SHARED_MEMORY`` are added to ``failures``.
    """
    purposes = list(launches(1, 1, 1, 1, "tf32"))
    yield f"| layer (D, R, O) | operands | {' | '.join(purposes)} | bytes spilled |"
    yield "|---|---|" + "---|" * len(purposes) + "---|"
    rows = [(layer, kind) for layer in layers for kind in KINDS]
    for layer, kind in tqdm(rows, desc="compile", file=sys.stderr):
        cells, spilled = [], 0
        for purpose, launch, operand in launches_of(layer, kind):
            used = [compile_launch(launch, operand, capability) for capability in ARCHITECTURES]
            cells.append(" / ".join(f"{u.registers}, {u.shared / 1024:.0f}" for u in used))
            spilled += sum(u.spilled for u in used)
            if any(u.spilled or u.shared > SHARED_MEMORY for u in used):
                failures.append(f"{layer.name}, {kind}, {purpose}: {used}")
        sizes = f"({layer.values}, {layer.rank}, {layer.units})"
        yield f"| {layer.name} {sizes} | {kind} | {' | '.join(cells)} | {spilled} |"


def operations(layer: Layer, batch: int) -> tuple[float, float]:
    """Count the operations of a forward pass and of a whole step with norm: P and 4 P + 2 Q."""
    pairs = 2.0 * batch * layer.positions * layer.units
    step = 4 * layer.values * layer.rank + 2 * layer.rank**2
    return pairs * layer.values * layer.rank, pairs * step


def least_bytes(layer: Layer, batch: int, width: int) -> tuple[float, float]:
    """Count the bytes of a forward pass and of a step that move each operand of a launch once.

    ``width`` is the size of an operand's number in bytes.
    """
    positions = batch * layer.positions
    rows, z = positions * layer.values, positions * layer.rank
    weight, outputs = layer.units * layer.values * layer.rank, positions * layer.units
    forward = width * (rows + z + weight) + 4 * 2 * outputs
    backward = width * (2 * rows + 2 * z + 2 * weight) + 4 * (rows + 2 * z + weight + 5 * outputs)
    return forward, forward + backward


def roofline_table(layers: list[Layer], batch: int = 64) -> Iterator[str]:
    """Yield the lines of the table of least times, which says where memory is the limit."""
    yield (
        "| layer | N | D | R | O | forward GFLOP | step GFLOP | "
        + " | ".join(f"{kind} forward / step, us" for kind in H100)
        + " |"
    )
    yield "|---|---|---|---|---|---|---|" + "---|" * len(H100)
    total = {kind: [0.0, 0.0] for kind in H100}
    for layer in layers:
        flops, cells = operations(layer, batch), []
        for kind, rate in H100.items():
            moved = least_bytes(layer, batch, 2 if kind == "bf16" else 4)
            times = [
                1e6 * max(work / rate, size / H100_BANDWIDTH)
                for work, size in zip(flops, moved, strict=True)
            ]
            bound = [
                "memory" if size / H100_BANDWIDTH > work / rate else ""
                for work, size in zip(flops, moved, strict=True)
            ]
            total[kind] = [a + b for a, b in zip(total[kind], times, strict=True)]
            cells.append(
                " / ".join(
                    f"{time:.0f} {limit}".strip() for time, limit in zip(times, bound, strict=True)
                )
            )
        shape = f"{batch * layer.positions} | {layer.values} | {layer.rank} | {layer.units}"
        counts = f"{flops[0] / 1e9:.0f} | {flops[1] / 1e9:.0f}"
        yield f"| {layer.name} | {shape} | {counts} | {' | '.join(cells)} |"
    sums = " | ".join(f"{forward:.0f} / {step:.0f}" for forward, step in total.values())
    yield f"| all nine | | | | | | | {sums} |"


def main() -> None:
    """Print both tables; exit with the launches that use too much."""
    failures: list[str] = []
    names = " / ".join(f"sm_{capability}" for capability in ARCHITECTURES)
    print(f"Triton {triton.__version__}, {names}, batch 64\n")
    print("\n".join(resource_table([*l_coda(), *s_coda(), *hybrids()], failures)), end="\n\n")
    print("\n".join(roofline_table(l_coda())))
    if failures:
        sys.exit("spilled or too much shared memory:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
