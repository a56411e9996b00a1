"""Predictions of ``coda plan --gpu cpu``, time and peak memory, against real training steps.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/plan.py [--fresh]

With --fresh the profile of this machine is measured first, even if there is a kept one.

A step is forward, backward and AdamW of random images, the best of those that fit into some
seconds, every case in processes of its own. Its peak is the highest resident memory less that of a
process that has trained something tiny, with blocks of a megabyte and more given back at once: by
its defaults glibc keeps them, and what it then holds depends on their order (the last column).
"""

import multiprocessing as mp
import os
import sys
import time
from pathlib import Path

import timm
import torch

# Registers the CoDA models.
import pipeline  # noqa: F401
from pipeline.planning.cpu_plan import cpu_step
from pipeline.planning.cpu_profile import CPUProfile, cpu_profile, measure_cpu

CASES = [
    ("resnet20", 64, 32),
    ("resnet20", 256, 32),
    ("coda_resnet20", 64, 32),
    ("coda_resnet20", 256, 32),
    ("coda_s", 4, 32),
    ("coda_resnet18", 8, 160),
    ("coda_resnet50", 4, 160),
    ("coda_resnet50", 2, 224),
    ("resnet50", 8, 160),
]
# Time of the steps that are measured in each case.
SECONDS = 6.0


def measured(name: str, batch: int, size: int, queue: "mp.Queue[tuple[float, int]]") -> None:
    """Put the seconds of a training step and the bytes of its peak into ``queue``."""
    torch.manual_seed(0)
    # Loads the libraries.
    _steps("coda_resnet20", 2, 32, 0.0)
    start = _resident("VmRSS")
    seconds = _steps(name, batch, size, 0.0 if "MALLOC_MMAP_THRESHOLD_" in os.environ else SECONDS)
    queue.put((seconds, _resident("VmHWM") - start))


def _in_a_process(*case: object) -> tuple[float, int]:
    context = mp.get_context("spawn")
    queue: mp.Queue[tuple[float, int]] = context.Queue()
    process = context.Process(target=measured, args=(*case, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def _steps(name: str, batch: int, size: int, least: float) -> float:
    """Time training steps, after one to warm up.

    Returns:
        Seconds of the best of three steps or more, as many as take ``least`` seconds.
    """
    model = timm.create_model(name).train()
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.rand(batch, 3, size, size)
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        began = time.perf_counter()
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _resident(line: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at their most (VmHWM)."""
    status = dict(
        entry.split(":", 1) for entry in Path("/proc/self/status").read_text().splitlines()
    )
    return int(status[line].split()[0]) * 1024


def main() -> None:
    """Print a Markdown table with a row for each case."""
    profile = CPUProfile("", measure_cpu()) if "--fresh" in sys.argv else cpu_profile()
    print(
        "| model | batch | pixels | step, s: predicted | measured | ratio "
        "| peak, MB: predicted | measured | ratio | glibc's defaults, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, batch, size in CASES:
        seconds, peak = cpu_step(
            timm.create_model(name, device="meta"), (3, size, size), batch, profile
        )
        true_seconds, kept = _in_a_process(name, batch, size)
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(10**6)
        _, true_peak = _in_a_process(name, batch, size)
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        row = [
            f"`{name}`",
            str(batch),
            f"{size}²",
            f"{seconds:.3f}",
            f"{true_seconds:.3f}",
            f"{seconds / true_seconds:.2f}",
        ]
        row += [
            f"{peak / 1e6:.0f}",
            f"{true_peak / 1e6:.0f}",
            f"{peak / true_peak:.2f}",
            f"{kept / 1e6:.0f}",
        ]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
