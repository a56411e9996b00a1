"""Data-parallel efficiency on this machine: ``python -m benchmarks.scaling``.

Real training runs (`coda train` under torchrun, digits at 32 x 32, 64 images per process and
update) with one processor core for each process: the images per second of two processes are
compared with twice those of one, in turns. Then the share of an update that the exchange of the
gradients takes is measured, as an all-reduce of as many bytes by itself. ``--gradients`` measures
nothing and prints the bytes of every model's gradients.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from tqdm import tqdm

import pipeline  # noqa: F401  registers the models
from pipeline.data.prepare import prepare
from pipeline.recipe.load import from_dict, load

IMAGES = 64
"""Images per process and update."""
EVERY = 5
"""Updates between two logged speeds."""
ROOT = Path(__file__).parents[1]


def train(folder: Path, name: str, processes: int, epochs: int, model: str) -> float:
    """Return the median images per second of a training run with one core per process."""
    recipe = load(ROOT / "recipes" / "digits_coda_resnet20.yaml").to_dict()
    recipe |= {"name": name, "runs": str(folder)}
    recipe["model"] = {"name": model}
    recipe["data"]["prepared"] = str(folder / "data")
    recipe["training"] |= {
        "epochs": epochs,
        "global_batch_size": IMAGES * processes,
        "warmup_epochs": 0,
    }
    recipe["evaluation"] |= {"every_epochs": epochs, "final_metrics": ["accuracy"]}
    recipe["tracking"]["log_every_updates"] = EVERY
    prepare(from_dict(recipe))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:processes]))
    command = [
        "taskset",
        "-c",
        cores,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "-m", "pipeline", "train", str(path)],
        check=True,
        capture_output=True,
        env=environment,
    )
    lines = map(json.loads, (folder / name / "journal.jsonl").read_text().splitlines())
    rates = [line["value"] for line in lines if line["key"] == "speed/images_per_second"]
    return statistics.median(rates[1:])


def exchange(rank: int, port: int, numbers: int, folder: str) -> None:
    """Write the median seconds of an all-reduce of ``numbers`` fp32 values of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    values, times = torch.rand(numbers), []
    for _ in range(20):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        times.append(time.perf_counter() - start)
    if rank == 0:
        Path(folder, "seconds").write_text(str(statistics.median(times)))
    dist.destroy_process_group()


def gradients(name: str) -> tuple[int, int]:
    """Return the classes and the parameters of a registered model.

    Its gradients are exchanged once per update in fp32, with 4 bytes per parameter.
    """
    with torch.device("meta"):
        model = timm.create_model(name)
    return model.num_classes, sum(parameter.numel() for parameter in model.parameters())


def print_gradients() -> None:
    """Print the bytes of every model's gradients."""
    print("| model | classes | parameters | gradients an update, MB |")
    print("|---|---|---|---|")
    for name in timm.list_models():
        if timm.model_entrypoint(name).__module__.startswith("pipeline."):
            classes, numbers = gradients(name)
            print(f"| {name} | {classes} | {numbers:,} | {4 * numbers / 1e6:.1f} |")


def main() -> None:
    """Measure and print the efficiency, or print the gradients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="coda_resnet20")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--gradients", action="store_true", help="only the bytes of every model's gradients"
    )
    options = parser.parse_args()
    if options.gradients:
        print_gradients()
        return
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in tqdm(range(options.repeats), file=sys.stderr):
            for processes, found in rates.items():
                found.append(
                    train(
                        Path(folder),
                        f"{processes}-{repeat}",
                        processes,
                        options.epochs * processes,
                        options.model,
                    )
                )
        _, numbers = gradients(options.model)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(exchange, (port, numbers, folder), nprocs=2)
        seconds = float(Path(folder, "seconds").read_text())
    one, two = (statistics.median(found) for found in rates.values())
    update = 2 * IMAGES / two
    print(
        f"{options.model}: {one:.1f} images/s in one process, {two:.1f} in two: "
        f"efficiency {two / (2 * one):.3f}"
    )
    print(
        f"gradients {4 * numbers / 1e6:.2f} MB; exchanged in {1e3 * seconds:.1f} ms, "
        f"{100 * seconds / update:.1f} % of an update"
    )


if __name__ == "__main__":
    main()
