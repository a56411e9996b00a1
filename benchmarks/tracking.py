"""The cost of tracking in a training step, whatever state MLflow is in.

``python -m benchmarks.tracking`` makes real updates of a hybrid on one thread, every tenth of which
logs four values, as the recipes do, and compares them with the same updates that log to nowhere. A
server that answers is the real one; the faulty ones are proxies before it. Blocks of updates
alternate: nowhere, a state, nowhere, the next state, ... A block begins when the run's start has
been delivered, or has failed to be. The ratio is a block's time over the mean of the two blocks to
nowhere beside it: median over the rounds, and its range.
"""

import argparse
import os
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

# The sender's thread would otherwise import it in the middle of a block.
import mlflow  # noqa: F401
import timm
import torch
import yaml
from tqdm import tqdm

# Registers the models.
import pipeline  # noqa: F401
from pipeline.distributed import World
from pipeline.recipe.load import from_dict
from pipeline.recipe.schema import TrackingRecipe
from pipeline.run_folder import RunFolder
from pipeline.tracking import NullTracker, Tracker, open_tracker
from tests.tracking.faulty_proxy import FaultyProxy

ROOT = Path(__file__).parents[1]
LOG_EVERY = TrackingRecipe().log_every_updates


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(folder: Path, port: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "serve",
        "--runs",
        str(folder / "server"),
        "--port",
        str(port),
    ]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
        )
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return server
        except OSError:
            time.sleep(0.5)


def make_update(batch: int) -> Callable[[], float]:
    """A function that makes an optimiser update of a hybrid and returns its loss."""
    torch.manual_seed(0)
    model = timm.create_model("coda_resnet20", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images, labels = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))

    def update() -> float:
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return update


def block(update: Callable[[], float], tracker: Tracker, updates: int) -> float:
    """Make ``updates``, logged as often as in a training run; returns the seconds."""
    start = time.perf_counter()
    for step in range(updates):
        loss = update()
        if step % LOG_EVERY == 0:
            values = {
                "train/loss": loss,
                "train/learning_rate": 1e-3,
                "speed/images_per_second": 1.0,
                "speed/device_hours": 1.0,
            }
            tracker.metrics(values, step)
    return time.perf_counter() - start


def tracker_to(uri: str | None, folder: Path) -> Tracker:
    tree = {
        "name": folder.name,
        "runs": str(folder.parent),
        "model": {"name": "coda_resnet20"},
        "data": {"source": "digits", "image_size": 32},
    }
    tree |= {
        "training": {"epochs": 1, "global_batch_size": 64, "learning_rate": 1e-3},
        "tracking": {"uri": uri},
    }
    recipe = from_dict(tree)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    return open_tracker(recipe, RunFolder(folder), World())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=160, help="of a block")
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # So that nothing is left of a block when the next one begins.
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "2"
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        server = start_server(folder, port)
        slow, silent, broken = (FaultyProxy(port, fault) for fault in ("late", "silent", "error"))
        for database in ("locked", "own"):
            tracker_to(
                f"sqlite:///{folder / database / 'mlflow.db'}", folder / "runs" / f"make-{database}"
            ).close()
        lock = sqlite3.connect(folder / "locked" / "mlflow.db", isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        states = {
            "server up": f"http://127.0.0.1:{port}",
            "server down": f"http://127.0.0.1:{free_port()}",
            "server accepts and never answers": silent.uri,
            "server answers after 4 s": slow.uri,
            "server answers 500": broken.uri,
            "SQLite file": f"sqlite:///{folder / 'own' / 'mlflow.db'}",
            "SQLite file, locked": f"sqlite:///{folder / 'locked' / 'mlflow.db'}",
        }
        update = make_update(options.batch)
        # The first block warms up, and is not counted.
        block(update, NullTracker(), options.updates)
        ratios: dict[str, list[float]] = {state: [] for state in states}
        alone: list[float] = []
        for number in tqdm(range(options.rounds), file=sys.stderr):
            before = block(update, NullTracker(), options.updates)
            for index, (state, uri) in enumerate(states.items()):
                tracker = tracker_to(uri, folder / "runs" / f"{number}-{index}")
                # The start of a run is delivered, or the sender has met its fault.
                tracker.flush(3)
                seconds = block(update, tracker, options.updates)
                # As KILLED it waits for MLflow for seconds only.
                tracker.close("KILLED")
                after = block(update, NullTracker(), options.updates)
                ratios[state].append(2 * seconds / (before + after))
                alone.append(after)
                before = after
        server.terminate()
    milliseconds = 1e3 * statistics.median(alone) / options.updates
    print(
        f"{milliseconds:.1f} ms per update to nowhere, "
        f"{options.rounds} rounds of {options.updates} updates"
    )
    for state, found in ratios.items():
        print(f"{state:34}{statistics.median(found):7.3f}   ({min(found):.3f} to {max(found):.3f})")
    noise = statistics.median(abs(a / b - 1) for a, b in zip(alone[1:], alone, strict=False))
    print(f"two neighbouring blocks to nowhere differ by {100 * noise:.1f} % (median)")


if __name__ == "__main__":
    main()
