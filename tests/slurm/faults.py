"""The fault campaign: a training under Slurm is hit again and again, and must end as if nothing had
happened.

``python tests/slurm/faults.py [--events 60] [--seed 0]`` runs it as root (``make faults``) and
prints its table. Every event strikes after the attempt has saved something new, at a random update,
on a random process or node; "start-up" strikes before its first update.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import yaml
from local_slurm import Job, LocalSlurm
from recipes_for_tests import small_recipe
from tqdm import tqdm

from pipeline.data.prepare import prepare
from pipeline.recipe.schema import Recipe

ONE_PROCESS_A_NODE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
UPDATES_AN_EPOCH, EPOCHS_AN_EVALUATION = 11, 4
# updates from one event to the next, at most
UPDATES_BETWEEN = 14
# that a training does until an event has ended it, ample on average
UPDATES_AN_EVENT, UPDATES_AT_A_TIME_LIMIT = 20, 240

# for which a process waits for the other
TIMEOUT_SECONDS = 30


@dataclass
class Training:
    """A training job, its processes and its run folder."""

    slurm: LocalSlurm
    recipe: Recipe
    job: Job
    random: random.Random
    disk: Path
    """Holds the run folder."""

    @property
    def saved(self) -> int:
        found = (self.recipe.folder.path / "checkpoints").glob("update-*")
        return max((int(path.name.removeprefix("update-")) for path in found), default=0)

    def processes(self) -> dict[int, int]:
        """Rank -> process id, of the processes that run now."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                environment = dict(
                    entry.partition("=")[::2]
                    for entry in (folder / "environ").read_text().split("\0")
                )
                parent = Path(f"/proc/{_parent(int(folder.name))}/cmdline").read_bytes()
            except (OSError, UnicodeDecodeError):
                # gone, or none of ours
                continue
            ours = (
                b"pipeline" in words
                and environment.get("SLURM_JOB_ID") == self.job.number
                and "SLURM_STEP_ID" in environment
            )
            # not a process of the process
            if ours and b"slurmstepd" in parent:
                found[int(environment["SLURM_PROCID"])] = int(folder.name)
        return found

    def one(self) -> int:
        """Process id of a random rank."""
        self.job.wait(lambda: len(self.processes()) == 2, "two processes")
        return self.processes()[self.random.randrange(2)]

    def wait_for_saving(self) -> None:
        checkpoints = self.recipe.folder.path / "checkpoints"
        self.job.wait(lambda: any(checkpoints.glob(".saving-*")), "a save", every=0.001)

    def signal(self, name: str) -> None:
        self.slurm.run("scancel", f"--signal={name}", self.job.number)


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


# An event strikes, yields until the attempt is over, and repairs what a person or the machine's
# owner would repair: nothing of the job.


def kill_rank(training: Training) -> Iterator[None]:
    os.kill(training.one(), signal.SIGKILL)
    yield


def interrupt_rank(training: Training) -> Iterator[None]:
    """One process ends by itself with an exception; the others learn nothing of it but the loss of
    their connection.
    """
    os.kill(training.one(), signal.SIGINT)
    yield


def kill_slurmstepd(training: Training) -> Iterator[None]:
    """A process and Slurm's daemon over it; without that one alone, the process and its training
    would simply go on.
    """
    process = training.one()
    for number in (_parent(process), process):
        os.kill(number, signal.SIGKILL)
    yield


def kill_node(training: Training) -> Iterator[None]:
    """All of a node's processes at once, as when its power fails; it comes back when Slurm has
    noticed.
    """
    node = f"n{training.random.randint(1, 2)}"
    training.slurm.cluster("kill-node", node)
    yield
    training.job.wait(
        lambda: "DOWN" in training.slurm.run("scontrol", "show", "node", node),
        "a node that is down",
    )
    training.slurm.cluster("start-node", node)


def cut_link(training: Training) -> Iterator[None]:
    """The network of a node, until Slurm has given it up.

    Slurm takes a node back at its first answer and starts the job there at once. Where the job's
    script ran, it would find the old one, which could not report its end, drain the node and hold
    the job: the node's owner restarts that node first.
    """
    node = f"n{training.random.randint(1, 2)}"
    restarted = node == training.job.field("BatchHost")
    training.slurm.cluster("cut", node)
    try:
        yield
        training.job.wait(
            lambda: "DOWN" in training.slurm.run("scontrol", "show", "node", node),
            "a node that is down",
        )
        if restarted:
            training.slurm.cluster("kill-node", node)
    finally:
        training.slurm.cluster("heal", node)
    if restarted:
        training.slurm.cluster("start-node", node)


def stop_rank(training: Training) -> Iterator[None]:
    """Both processes must say where they stood: the one that waits in vain at once, the stopped one
    when Slurm wakes it to end it.
    """
    attempt = training.job.restarts
    os.kill(training.one(), signal.SIGSTOP)
    yield
    for rank in range(2):
        stacks = (
            training.recipe.folder.path
            / "stacks"
            / f"slurm-{training.job.number}.{attempt}-rank-{rank}.txt"
        )
        assert "most recent call first" in stacks.read_text(), stacks


def ask_by_usr1(training: Training) -> Iterator[None]:
    training.signal("USR1")
    yield


def ask_by_term(training: Training) -> Iterator[None]:
    training.signal("TERM")
    yield


def ask_during_save(training: Training) -> Iterator[None]:
    process = training.one()
    training.wait_for_saving()
    os.kill(process, signal.SIGUSR1)
    yield


def ask_during_evaluation(training: Training) -> Iterator[None]:
    """Right after the checkpoint of an epoch, which the evaluation follows."""
    process, saved = training.one(), training.saved
    every = UPDATES_AN_EPOCH * EPOCHS_AN_EVALUATION
    training.job.wait(
        lambda: training.saved > saved and not training.saved % every, "an evaluation", every=0.001
    )
    os.kill(process, signal.SIGUSR1)
    yield


def reach_time_limit(training: Training) -> Iterator[None]:
    """Slurm itself asks, by the script's --signal=USR1@300."""
    training.slurm.run("scontrol", "update", f"JobId={training.job.number}", "TimeLimit=5")
    yield
    training.slurm.run("scontrol", "update", f"JobId={training.job.number}", "TimeLimit=1440")


def preempt(training: Training) -> Iterator[None]:
    job = training.slurm.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"
    )
    yield
    job.wait_for_end()


def kill_during_save(training: Training) -> Iterator[None]:
    process = training.one()
    training.wait_for_saving()
    os.kill(process, signal.SIGKILL)
    yield


def fill_disk(training: Training) -> Iterator[None]:
    filler = training.disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    yield
    filler.unlink()


EVENTS: dict[str, Callable[[Training], Iterator[None]]] = {
    "SIGKILL of a process": kill_rank,
    "exception in a process": interrupt_rank,
    "SIGKILL of slurmstepd": kill_slurmstepd,
    "SIGKILL of a node": kill_node,
    "link cut": cut_link,
    "SIGSTOP of a process": stop_rank,
    "USR1": ask_by_usr1,
    "USR1 in start-up": ask_by_usr1,
    "USR1 during a save": ask_during_save,
    "USR1 in an evaluation": ask_during_evaluation,
    "TERM": ask_by_term,
    "time limit": reach_time_limit,
    "preemption": preempt,
    "SIGKILL during a save": kill_during_save,
    "full disk": fill_disk,
}
# and so all jobs
STRIKES_NODES = {"SIGKILL of a node", "link cut", "preemption"}
# seconds
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


def start(slurm: LocalSlurm, recipe: Recipe, generator: random.Random, disk: Path) -> Training:
    path = slurm.submit_folder / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    slurm.environment["CODA_TIMEOUT_SECONDS"] = str(TIMEOUT_SECONDS)
    job = slurm.submit(*ONE_PROCESS_A_NODE, "slurm/imagenet_coda.sh", path.name)
    return Training(slurm, recipe, job, generator, disk)


def strike(training: Training, name: str) -> tuple[float, float]:
    """Let one event happen; seconds from it to the end of all processes of the attempt, and to
    those of the next.
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
    """The same of MLflow's one run of that name."""
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
    """One training under the events ``names``, with its run on ``disk``, and one without.

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
        return start(slurm, recipe, random.Random(seed), disk)

    whole = begin("whole", folder)
    if STRIKES_NODES & set(names):
        whole.job.wait_for_end(1800)
    training = begin("struck", disk)
    for name in tqdm(names, desc="faults"):
        ended, resumed = strike(training, name)
        table.append((name, ended, resumed))
        tqdm.write(
            f"{name}: ended after {ended:.1f} s, next attempt after {resumed:.0f} s, saved update {training.saved}"
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
    # stops the cluster, too
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
        "| event | times | longest until all processes have ended, s | longest until those of the next attempt run, s |"
    )
    print("|---|---|---|---|")
    for name in EVENTS:
        rows = [row for row in table if row[0] == name]
        if rows:
            print(
                f"| {name} | {len(rows)} | {max(row[1] for row in rows):.1f} | {max(row[2] for row in rows):.0f} |"
            )
    print(
        f"{len(table)} events: weights bitwise equal to the uninterrupted run's, every metric once"
    )
    if late(table):
        sys.exit(f"ended too late: {late(table)}")


if __name__ == "__main__":
    main()
