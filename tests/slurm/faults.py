"""The fault campaign: a training under Slurm is hit again and again, and must end as if nothing had happened.

``python tests/slurm/faults.py [--events 60] [--seed 0]`` runs it as root (``make faults``) and prints its table. Every event strikes
after the attempt has saved something new, at a random update, on a random process; "start-up" strikes before its first update.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import mlflow
import yaml
from local_slurm import Job, LocalSlurm
from recipes_for_tests import small_recipe
from tqdm import tqdm

from pipeline.data.write import prepare
from pipeline.recipe import Recipe

ONE_PROCESS_A_NODE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
UPDATES_AN_EPOCH = 11
UPDATES_BETWEEN = 14  # updates from one event to the next, at most


@dataclass
class Training:
    """A training job, its processes and its run folder."""

    slurm: LocalSlurm
    recipe: Recipe
    job: Job
    random: random.Random
    disk: Path | None = None  # mount point of the small disk that holds the run folder

    @property
    def saved(self) -> int:
        found = (self.recipe.folder / "checkpoints").glob("update-*")
        return max((int(path.name.removeprefix("update-")) for path in found), default=0)

    def processes(self) -> dict[int, int]:
        """Rank -> process id, of the processes that run now."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                environment = dict(entry.partition("=")[::2] for entry in (folder / "environ").read_text().split("\0"))
                parent = Path(f"/proc/{_parent(int(folder.name))}/cmdline").read_bytes()
            except (OSError, UnicodeDecodeError):
                continue  # gone, or none of ours
            ours = b"pipeline" in words and environment.get("SLURM_JOB_ID") == self.job.number and "SLURM_STEP_ID" in environment
            if ours and b"slurmstepd" in parent:  # not a process of the process
                found[int(environment["SLURM_PROCID"])] = int(folder.name)
        return found

    def one(self) -> int:
        """Process id of a random rank."""
        self.job.wait(lambda: len(self.processes()) == 2, "two processes")
        return self.processes()[self.random.randrange(2)]

    def signal(self, name: str) -> None:
        self.slurm.run("scancel", f"--signal={name}", self.job.number)

    def wait_for_restart(self, restarts: int) -> None:
        self.job.wait(lambda: self.job.restarts > restarts, "a requeue", 240)


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _descendants(process: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            child = int(path.name) if _parent(int(path.name)) == process else None
        except OSError:
            continue
        if child:
            yield child
            yield from _descendants(child)


def kill_rank(training: Training) -> None:
    os.kill(training.one(), signal.SIGKILL)


def kill_slurmstepd(training: Training) -> None:
    """A process and Slurm's daemon over it; without that one alone, the process and its training would simply go on."""
    process = training.one()
    for number in (_parent(process), process):
        os.kill(number, signal.SIGKILL)


def kill_node(training: Training) -> None:
    """All of the second node's processes at once, as when its power fails; it comes back when Slurm has noticed."""
    training.job.wait(lambda: len(training.processes()) == 2, "two processes")
    task = training.processes()[1]
    step = _parent(task)
    daemon = int((training.slurm.folder / "slurmd-n2.pid").read_text())
    for process in (daemon, step, *_descendants(task), task):
        os.kill(process, signal.SIGKILL)
    training.job.wait(lambda: "DOWN" in training.slurm.run("scontrol", "show", "node", "n2"), "a node that is down", 120)
    training.slurm.cluster("start-node", "n2")


def stop_rank(training: Training) -> None:
    os.kill(training.one(), signal.SIGSTOP)


def ask_by_usr1(training: Training) -> None:
    training.signal("USR1")


def ask_by_term(training: Training) -> None:
    training.signal("TERM")


def preempt(training: Training) -> None:
    job = training.slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    job.wait_for_end()


def kill_during_save(training: Training) -> None:
    checkpoints = training.recipe.folder / "checkpoints"
    process = training.one()
    training.job.wait(lambda: any(checkpoints.glob(".saving-*")), "a save", every=0.001)
    os.kill(process, signal.SIGKILL)


def fill_disk(training: Training) -> None:
    assert training.disk
    filler, restarts = training.disk / "filler", training.job.restarts
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    ended = f"attempt {restarts} ended with"
    training.job.wait(lambda: ended in training.job.log, "the end of the attempt", 120)
    filler.unlink()


EVENTS: dict[str, Callable[[Training], None]] = {
    "SIGKILL of a process": kill_rank,
    "SIGKILL of slurmstepd": kill_slurmstepd,
    "SIGKILL of a node": kill_node,
    "SIGSTOP of a process": stop_rank,
    "USR1 (time limit)": ask_by_usr1,
    "USR1 in start-up": ask_by_usr1,
    "TERM": ask_by_term,
    "preemption": preempt,
    "SIGKILL during a save": kill_during_save,
    "full disk": fill_disk,
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


def start(slurm: LocalSlurm, recipe: Recipe, generator: random.Random, disk: Path | None = None) -> Training:
    path = slurm.submit_folder / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    slurm.environment["CODA_TIMEOUT_SECONDS"] = "20"
    job = slurm.submit(*ONE_PROCESS_A_NODE, "slurm/imagenet_coda.sh", path.name)
    return Training(slurm, recipe, job, generator, disk)


def strike(training: Training, name: str) -> float:
    """Let one event happen, wait for the requeue, and return the seconds until the next attempt has begun its work."""
    job, restarts = training.job, training.job.restarts
    if name.endswith("in start-up"):
        job.wait(lambda: len(training.processes()) == 2, "two processes")
    else:
        fruit = training.saved
        target = fruit + training.random.randint(1, UPDATES_BETWEEN)
        job.wait(lambda: training.saved >= target, f"a checkpoint at update {target}", every=0.01)
    struck = time.monotonic()
    EVENTS[name](training)
    training.wait_for_restart(restarts)
    job.wait(lambda: len(training.processes()) == 2, "processes of the next attempt")
    return time.monotonic() - struck


def weights(recipe: Recipe) -> bytes:
    return (recipe.folder / "export" / "model.safetensors").read_bytes()


def metrics(recipe: Recipe) -> list[tuple[str, int, float]]:
    """All entries of the journal but those that a clock decides."""
    lines = [json.loads(line) for line in (recipe.folder / "journal.jsonl").read_text().splitlines()]
    found = [(line["key"], line["step"], line["value"]) for line in lines if line["kind"] == "metric"]
    return sorted(entry for entry in found if not entry[0].startswith("speed/"))


def tracked(recipe: Recipe) -> list[tuple[str, int, float]]:
    """The same of MLflow's one run of that name."""
    client = mlflow.MlflowClient(recipe.tracking_uri)
    experiment = client.get_experiment_by_name(recipe.tracking.experiment)
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{recipe.name}'")
    names = [name for name in run.data.metrics if not name.startswith("speed/")]
    return sorted((name, point.step, point.value) for name in names for point in client.get_metric_history(run.info.run_id, name))


def campaign(slurm: LocalSlurm, recipe_of: Callable[..., Recipe], names: list[str], seed: int) -> list[tuple[str, int, float]]:
    """One training under the events ``names`` and one without; (event, update, seconds to the next attempt) of each event.

    Raises:
        AssertionError: the two do not end with the same weights and metrics, or one does not end.
    """
    folder = slurm.submit_folder
    epochs = max(2, -(-len(names) * (UPDATES_BETWEEN + 10) // UPDATES_AN_EPOCH))
    common = dict(tracking__uri=f"sqlite:///{folder / 'mlflow.db'}", training__epochs=epochs, training__checkpoint_every_updates=3)
    table = []
    with small_disk(folder / "disk") if "full disk" in names else nullcontext(folder) as disk:
        whole = start(slurm, recipe_of(name="whole", runs=str(folder / "runs"), **common), random.Random(seed))
        whole.job.wait_for_end(900)
        assert whole.job.state == "COMPLETED", whole.job.reports()
        training = start(slurm, recipe_of(name="struck", runs=str(disk / "runs"), **common), random.Random(seed), disk)
        for name in tqdm(names, desc="faults"):
            seconds = strike(training, name)
            table.append((name, training.saved, seconds))
            tqdm.write(f"{name}: requeued after update {training.saved}, next attempt {seconds:.0f} s later")
        training.job.wait_for_end(900)
        assert training.job.state == "COMPLETED", training.job.reports()
        assert training.job.restarts >= len(names)
        assert weights(whole.recipe) == weights(training.recipe), "other weights"
        assert metrics(whole.recipe) == metrics(training.recipe) == tracked(training.recipe), "other metrics"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    names = [name for _ in range(-(-options.events // len(EVENTS))) for name in generator.sample(list(EVENTS), len(EVENTS))]
    with tempfile.TemporaryDirectory(prefix="coda-faults-") as folder:
        prepared = Path(folder) / "prepared"
        prepare(small_recipe(prepared))

        def recipe_of(**changes: object) -> Recipe:
            return small_recipe(prepared, model__name="coda_resnet20", model__args={"rank": 2}, **changes)

        with LocalSlurm(Path(folder)) as slurm:
            table = campaign(slurm, recipe_of, names[: options.events], options.seed)
    print("| event | times | seconds to the next attempt, longest |\n|---|---|---|")
    for name in EVENTS:
        seconds = [row[2] for row in table if row[0] == name]
        if seconds:
            print(f"| {name} | {len(seconds)} | {max(seconds):.0f} |")
    print(f"{len(table)} events: weights bitwise equal to the uninterrupted run's, every metric once")


if __name__ == "__main__":
    main()
