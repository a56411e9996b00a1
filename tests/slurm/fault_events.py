"""Events of the fault campaign: what happens to a training job, and what is repaired afterwards.

An event strikes, yields until the attempt is over, and repairs what a person or the machine's owner
would repair: nothing of the job.
"""

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from local_slurm import Job, LocalSlurm

from pipeline.recipe.schema import Recipe

UPDATES_AN_EPOCH = 11
EPOCHS_AN_EVALUATION = 4


@dataclass
class Training:
    """A training job, its processes and its run folder."""

    slurm: LocalSlurm
    recipe: Recipe
    job: Job
    random: random.Random
    disk: Path
    """The folder of the disk that holds the run folder."""

    @property
    def saved(self) -> int:
        """The last optimiser update of which there is a checkpoint."""
        found = (self.recipe.folder.path / "checkpoints").glob("update-*")
        return max((int(path.name.removeprefix("update-")) for path in found), default=0)

    def processes(self) -> dict[int, int]:
        """The processes that run now, as rank -> process id."""
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
                # The process is gone, or belongs to something else.
                continue
            ours = (
                b"pipeline" in words
                and environment.get("SLURM_JOB_ID") == self.job.number
                and "SLURM_STEP_ID" in environment
            )
            # A child of a rank's process, such as a loader's, does not count.
            if ours and b"slurmstepd" in parent:
                found[int(environment["SLURM_PROCID"])] = int(folder.name)
        return found

    def one(self) -> int:
        """Process id of a random rank."""
        self.job.wait(lambda: len(self.processes()) == 2, "two processes")
        return self.processes()[self.random.randrange(2)]

    def wait_for_saving(self) -> None:
        """Wait until a checkpoint is being written."""
        checkpoints = self.recipe.folder.path / "checkpoints"
        self.job.wait(lambda: any(checkpoints.glob(".saving-*")), "a save", every=0.001)

    def signal(self, name: str) -> None:
        self.slurm.run("scancel", f"--signal={name}", self.job.number)


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def kill_rank(training: Training) -> Iterator[None]:
    os.kill(training.one(), signal.SIGKILL)
    yield


def interrupt_rank(training: Training) -> Iterator[None]:
    """One process ends by itself with an exception; the other only sees its connection lost."""
    os.kill(training.one(), signal.SIGINT)
    yield


def kill_slurmstepd(training: Training) -> Iterator[None]:
    """Kill a process and Slurm's daemon over it.

    Without the daemon alone, the process would simply go on training.
    """
    process = training.one()
    for number in (_parent(process), process):
        os.kill(number, signal.SIGKILL)
    yield


def kill_node(training: Training) -> Iterator[None]:
    """Kill all of a node's processes at once, as when its power fails.

    The node comes back when Slurm has noticed.
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
    """Cut the network of a node, until Slurm has given the node up.

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
    """Stop a process; both must write where they were.

    The one that waits in vain does so at once, the stopped one when Slurm wakes it to end it.
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
    """Ask right after the checkpoint of an epoch, which an evaluation follows."""
    process, saved = training.one(), training.saved
    every = UPDATES_AN_EPOCH * EPOCHS_AN_EVALUATION
    training.job.wait(
        lambda: training.saved > saved and not training.saved % every, "an evaluation", every=0.001
    )
    os.kill(process, signal.SIGUSR1)
    yield


def reach_time_limit(training: Training) -> Iterator[None]:
    """Let Slurm itself ask, by the script's --signal=USR1@300."""
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
