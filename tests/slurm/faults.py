"""The fault campaign: a training job under Slurm is hit again and again.

It must end as if nothing had happened. ``python tests/slurm/faults.py [--events 60] [--seed 0]``
runs it as root (``make faults``) and prints its table. Every event strikes after the attempt has
saved something new, at a random update, on a random process or node; "start-up" strikes before its
first update.
"""

import argparse
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import yaml
from fault_events import EPOCHS_AN_EVALUATION, EVENTS, UPDATES_AN_EPOCH, Training
from local_slurm import LocalSlurm
from recipes_for_tests import small_recipe
from tqdm import tqdm

from pipeline.data.prepare import prepare
from pipeline.recipe.schema import Recipe

ONE_PROCESS_A_NODE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
# From one event to the next, at most.
UPDATES_BETWEEN = 14
# Updates that a training run makes until an event has ended it, ample on average.
UPDATES_AN_EVENT = 20
UPDATES_AT_A_TIME_LIMIT = 240
# For which a process waits for the other.
TIMEOUT_SECONDS = 30
# Events that strike a node, and so all jobs.
STRIKES_NODES = {"SIGKILL of a node", "link cut", "preemption"}
# Seconds within which all processes have to end, for the events that kill one of them.
ENDS_WITHIN = {
    "SIGKILL of a process": 15,
    "exception in a process": 15,
    "SIGKILL during a save": 15,
}


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 64 MB at ``folder``; needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def submit(slurm: LocalSlurm, recipe: Recipe, generator: random.Random, disk: Path) -> Training:
    path = slurm.submit_folder / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    slurm.environment["CODA_TIMEOUT_SECONDS"] = str(TIMEOUT_SECONDS)
    job = slurm.submit(*ONE_PROCESS_A_NODE, "slurm/imagenet_coda.sh", path.name)
    return Training(slurm, recipe, job, generator, disk)


def strike(training: Training, name: str) -> tuple[float, float]:
    """Let one event happen.

    Returns:
        Seconds from it to the end of all processes of the attempt, and to those of the next.
    """
    job, restarts = training.job, training.job.restarts
    if name.endswith("in start-up"):
        job.wait(lambda: len(training.processes()) == 2, "two processes")
    else:
        target = training.saved + training.random.randint(1, UPDATES_BETWEEN)
        job.wait(lambda: training.saved >= target, f"a checkpoint at update {target}", every=0.01)
    with contextmanager(EVENTS[name])(training):
        struck = time.monotonic()
        job.wait(lambda: not training.processes(), "the end of all processes", every=0.1)
        ended = time.monotonic() - struck
    job.wait(lambda: job.restarts > restarts, "a requeue")
    job.wait(lambda: len(training.processes()) == 2, "processes of the next attempt")
    return ended, time.monotonic() - struck


def weights(recipe: Recipe) -> bytes:
    return (recipe.folder.path / "export" / "model.safetensors").read_bytes()


def metrics(recipe: Recipe) -> list[tuple[str, int, float]]:
    """All entries of the journal but those that a clock decides."""
    lines = [
        json.loads(line) for line in (recipe.folder.path / "journal.jsonl").read_text().splitlines()
    ]
    found = [
        (line["key"], line["step"], line["value"]) for line in lines if line["kind"] == "metric"
    ]
    return sorted(entry for entry in found if not entry[0].startswith("speed/"))


def tracked(recipe: Recipe) -> list[tuple[str, int, float]]:
    """The same entries, of MLflow's one run of that name."""
    client = mlflow.MlflowClient(recipe.tracking_uri)
    experiment = client.get_experiment_by_name(recipe.tracking.experiment)
    (run,) = client.search_runs(
        [experiment.experiment_id], f"attributes.run_name = '{recipe.name}'"
    )
    names = [name for name in run.data.metrics if not name.startswith("speed/")]
    return sorted(
        (name, point.step, point.value)
        for name in names
        for point in client.get_metric_history(run.info.run_id, name)
    )


def campaign(
    slurm: LocalSlurm, recipe_of: Callable[..., Recipe], names: list[str], seed: int, disk: Path
) -> list[tuple[str, float, float]]:
    """Train once under the events ``names``, with the run on ``disk``, and once without.

    Returns:
        (event, seconds to the end of the attempt, seconds to the next one) of each event.

    Raises:
        AssertionError: the two do not end with the same weights and metrics, or one does not end.
    """
    folder = slurm.submit_folder
    updates = sum(
        UPDATES_AT_A_TIME_LIMIT if name == "time limit" else UPDATES_AN_EVENT for name in names
    )
    table = []

    def begin(name: str, disk: Path) -> Training:
        changes = dict(
            training__epochs=-(-updates // UPDATES_AN_EPOCH),
            training__checkpoint_every_updates=3,
            evaluation__every_epochs=EPOCHS_AN_EVALUATION,
            tracking__uri=f"sqlite:///{folder / name}.db",
        )
        recipe = recipe_of(name=name, runs=str(disk / "runs"), **changes)
        return submit(slurm, recipe, random.Random(seed), disk)

    whole = begin("whole", folder)
    if STRIKES_NODES & set(names):
        whole.job.wait_for_end(1800)
    training = begin("struck", disk)
    for name in tqdm(names, desc="faults"):
        ended, resumed = strike(training, name)
        table.append((name, ended, resumed))
        tqdm.write(
            f"{name}: ended after {ended:.1f} s, next attempt after {resumed:.0f} s, "
            f"saved update {training.saved}"
        )
    for job in (whole.job, training.job):
        job.wait_for_end(1800)
        assert job.state == "COMPLETED", job.reports()
    assert weights(whole.recipe) == weights(training.recipe), "other weights"
    assert metrics(whole.recipe) == metrics(training.recipe) == tracked(training.recipe), (
        "other metrics"
    )
    assert training.job.restarts >= len(names)
    return table


def late(table: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """The events of a dead process after which the others needed longer than allowed."""
    return [row for row in table if row[1] > ENDS_WITHIN.get(row[0], math.inf)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # So that the cluster is stopped, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    generator = random.Random(options.seed)
    names = [
        name
        for _ in range(-(-options.events // len(EVENTS)))
        for name in generator.sample(list(EVENTS), len(EVENTS))
    ]
    with tempfile.TemporaryDirectory(prefix="coda-faults-") as folder:
        prepared = Path(folder) / "prepared"
        prepare(small_recipe(prepared))

        def recipe_of(**changes: object) -> Recipe:
            return small_recipe(
                prepared, model__name="coda_resnet20", model__args={"rank": 2}, **changes
            )

        # The disk comes first: a node with a network of its own also has the mounts of its start.
        with (
            small_disk(Path(folder) / "disk") as disk,
            LocalSlurm(Path(folder), networks=True) as slurm,
        ):
            table = campaign(slurm, recipe_of, names[: options.events], options.seed, disk)
    print(
        "| event | times | longest until all processes have ended, s "
        "| longest until those of the next attempt run, s |"
    )
    print("|---|---|---|---|")
    for name in EVENTS:
        rows = [row for row in table if row[0] == name]
        if rows:
            ended = max(row[1] for row in rows)
            resumed = max(row[2] for row in rows)
            print(f"| {name} | {len(rows)} | {ended:.1f} | {resumed:.0f} |")
    print(
        f"{len(table)} events: weights bitwise equal to the uninterrupted run's, every metric once"
    )
    if late(table):
        sys.exit(f"ended too late: {late(table)}")


if __name__ == "__main__":
    main()
