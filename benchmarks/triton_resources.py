"""Compile the DAU's Triton kernels for sm_80 and sm_90 without a GPU; print docs/triton.md's tables
(registers, spills, roofline).

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

from pipeline.models.dau import fused, fused_kernels

# compute capability -> what Triton has ptxas compile for
ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
# bytes a program may use on any device from sm_80 on: the limit of sm_86 and sm_89, below 163 and
# 227 KiB
SHARED_MEMORY = 99 * 1024
# -> operand type, precision
KINDS = {"fp32": ("fp32", "tf32x3"), "TF32": ("fp32", "tf32"), "bf16": ("bf16", "tf32")}
ALWAYS_FP32 = {"dot", "norm2", "scale", "out"}
# operations per second; three TF32 products make one of fp32 accuracy
H100 = {"fp32": 495e12 / 3, "TF32": 495e12, "bf16": 989e12}
# bytes per second
H100_BANDWIDTH = 3.35e12


@dataclass(frozen=True)
class Layer:
    name: str
    positions: int
    """Of one image."""
    values: int
    rank: int
    units: int


def l_coda() -> list[Layer]:
    """The nine layers of the official L-CoDA at 240 x 240."""
    units, ranks = [16, 32, 32, 64, 64, 64, 64, 64, 100], [64, 64, 64, 128, 128, 128, 256, 256, 256]
    return _chain(
        "L-CoDA", 240, [7, *[3] * 8], [3, 1, 1, 2, 1, 1, 2, 1, 1], [3, *[1] * 8], units, ranks
    )


def s_coda() -> list[Layer]:
    """The nine layers of the official S-CoDA at 32 x 32."""
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
    """Last stages of hybrids: wide 1x1 and 3x3 layers of low and high rank, and a classifier of
    1000 units.
    """
    wide = [Layer(f"hybrid 3x3 rank {rank}", 196, 256 * 9, rank, 256) for rank in (8, 16, 32, 64)]
    return [
        *wide,
        Layer("hybrid 1x1 rank 128", 49, 2048, 128, 512),
        Layer("hybrid classifier", 49, 512, 256, 1000),
    ]


@dataclass(frozen=True)
class Resources:
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes stored and loaded."""
    shared: int
    """Bytes of a program."""


def compile_launch(
    launch: fused.Launch, operand: str, capability: int, bias: bool = True, norm: bool = True
) -> Resources:
    """Compile as the just-in-time compiler would for 16-byte aligned tensors; raises triton's
    errors.
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
    return Resources(
        int(re.search(r"Used (\d+) registers", report)[1]), spilled, compiled.metadata.shared
    )


def _assemble(ptx: str, architecture: str) -> str:
    """What the ptxas that Triton ships reports of ``ptx``."""
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


def launches_of(
    layer: Layer, kind: str, batch: int = 64
) -> Iterator[tuple[str, fused.Launch, str]]:
    """(purpose, launch, operand type) of everything a layer launches in training; the norm part
    always has fp32 operands.
    """
    operand, precision = KINDS[kind]
    for purpose, launch in fused.launches(
        batch * layer.positions, layer.values, layer.rank, layer.units, precision
    ).items():
        yield purpose, launch, "fp32" if purpose.endswith("of norm2") else operand


def resource_table(layers: list[Layer], failures: list[str]) -> Iterator[str]:
    """Lines of the table, a cell "registers, KiB" for each architecture; what spills or exceeds
    ``SHARED_MEMORY`` joins ``failures``.
    """
    purposes = list(fused.launches(1, 1, 1, 1, "tf32"))
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
        yield f"| {layer.name} ({layer.values}, {layer.rank}, {layer.units}) | {kind} | {' | '.join(cells)} | {spilled} |"


def operations(layer: Layer, batch: int) -> tuple[float, float]:
    """Operations of a forward pass and of a whole step with norm: P and 4 P + 2 Q, positions times
    units in common.
    """
    pairs = 2.0 * batch * layer.positions * layer.units
    return pairs * layer.values * layer.rank, pairs * (
        4 * layer.values * layer.rank + 2 * layer.rank**2
    )


def least_bytes(layer: Layer, batch: int, width: int) -> tuple[float, float]:
    """Bytes of a forward pass and of a step if every operand of every launch crossed the memory bus
    once.
    """
    positions = batch * layer.positions
    rows, z = positions * layer.values, positions * layer.rank
    weight, outputs = layer.units * layer.values * layer.rank, positions * layer.units
    forward = width * (rows + z + weight) + 4 * 2 * outputs
    backward = width * (2 * rows + 2 * z + 2 * weight) + 4 * (rows + 2 * z + weight + 5 * outputs)
    return forward, forward + backward


def roofline_table(layers: list[Layer], batch: int = 64) -> Iterator[str]:
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
        yield f"| {layer.name} | {shape} | {flops[0] / 1e9:.0f} | {flops[1] / 1e9:.0f} | {' | '.join(cells)} |"
    sums = " | ".join(f"{forward:.0f} / {step:.0f}" for forward, step in total.values())
    yield f"| all nine | | | | | | | {sums} |"


def main() -> None:
    failures: list[str] = []
    print(
        f"Triton {triton.__version__}, {' / '.join(f'sm_{capability}' for capability in ARCHITECTURES)}, batch 64\n"
    )
    print("\n".join(resource_table([*l_coda(), *s_coda(), *hybrids()], failures)), end="\n\n")
    print("\n".join(roofline_table(l_coda())))
    if failures:
        sys.exit("spilled or too much shared memory:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
