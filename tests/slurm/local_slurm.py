"""A two-node Slurm for tests, by slurm/local_cluster.sh, and jobs on it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MISSING = [
    name
    for name in ("munged", "slurmctld", "slurmd", "srun")
    if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
]


class LocalSlurm:
    """A cluster, which ``with LocalSlurm(folder) as slurm`` starts and stops.

    Jobs are submitted from ``folder``/submit, which takes the place of the project's root.

    Args:
        folder: of the cluster; its path must be short.
        networks: whether each node has a network of its own.
        read_only: a folder in which such nodes cannot write.
    """

    def __init__(
        self, folder: Path, *, networks: bool = False, read_only: Path | None = None
    ) -> None:
        self.options = ["--networks"] if networks else []
        self.submit_folder = folder / "submit"
        self.submit_folder.mkdir(parents=True)
        for name in ("slurm", "recipes"):
            (self.submit_folder / name).symlink_to(ROOT / name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder = folder / "slurm"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "CODA_"))
        } | {
            "CODA_LOCAL_CLUSTER": str(self.folder),
            "CODA_LOCAL_CLUSTER_PORT": str(port),
            "CODA_LOCAL_CLUSTER_READ_ONLY": str(read_only or ""),
            "CODA_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def __enter__(self) -> "LocalSlurm":
        self.cluster("start", *self.options)
        return self

    def __exit__(self, *_: object) -> None:
        # A test may have stopped it.
        if self.folder.exists():
            self.cluster("stop")

    def cluster(self, *words: str) -> str:
        return self.run(str(ROOT / "slurm" / "local_cluster.sh"), *words)

    def run(self, *command: str) -> str:
        """Standard output of a command; its error output is shown if it fails."""
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.submit_folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str) -> "Job":
        """``sbatch words``: options, then the script and its arguments."""
        return Job(self, self.run("sbatch", "--parsable", *words).strip())


@dataclass
class Job:
    """A job on the cluster."""

    slurm: LocalSlurm
    number: str

    @property
    def state(self) -> str:
        return self.field("JobState")

    @property
    def restarts(self) -> int:
        return int(self.field("Restarts"))

    @property
    def log(self) -> str:
        path = self.slurm.submit_folder / f"coda-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def reports(self) -> str:
        """The logs of the job and of all processes of all attempts, for people."""
        logs = sorted((self.slurm.submit_folder / "logs" / self.number).rglob("rank-*.log"))
        return self.log + "".join(
            f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs
        )

    def field(self, name: str) -> str:
        shown = self.slurm.run("scontrol", "--oneliner", "show", "job", self.number).split()
        return next(word.partition("=")[2] for word in shown if word.startswith(f"{name}="))

    def wait(
        self, reached: Callable[[], bool], what: str, seconds: float = 300, every: float = 0.5
    ) -> None:
        """Wait until ``reached``; fail if that takes too long, or if the job is over before."""
        deadline = time.monotonic() + seconds
        checked = time.monotonic()
        while not reached():
            time.sleep(every)
            now = time.monotonic()
            if now > checked + 2:
                checked = now
                over = self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
                assert not over or reached(), (
                    f"job {self.number} is {self.state} before {what}\n{self.reports()}"
                )
            assert now < deadline, (
                f"{seconds} s without {what}: job {self.number} is {self.state}\n{self.reports()}"
            )

    def wait_for_end(self, seconds: float = 300) -> None:
        self.wait(
            lambda: self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"),
            "its end",
            seconds,
        )


PROGRAM = """#!/usr/bin/env python3
# Takes the interpreter's place and reports as a training run does, so that the job script is tested
# without one.
import os, signal, sys, time
# The job script imports before it starts processes.
if sys.argv[2].startswith("from pipeline"):
    sys.exit()
print("started as", *sys.argv[3:], flush=True)
if {fails_first!r} in sys.argv and "SLURM_RESTART_COUNT" not in os.environ:
    os.kill(os.getpid(), signal.SIGKILL)
with open(os.environ["CODA_REPORTS"] + "/events-" + os.environ["SLURM_PROCID"], "a") as file:
    file.write({event!r})
signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
print("coda: what is wrong", flush=True)
time.sleep({seconds})
sys.exit({code})
"""


SMALL = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


def stand_in(slurm: LocalSlurm, program: str, *, fails_first: str = "", **values: object) -> None:
    """Let jobs run PROGRAM in place of the interpreter.

    Args:
        slurm: the cluster.
        program: name of the file.
        fails_first: a word; where PROGRAM is called with it, its first attempt dies.
        **values: of PROGRAM's fields.
    """
    program_file = slurm.submit_folder / f"{program}.py"
    program_file.write_text(PROGRAM.format(fails_first=fails_first, **values))
    program_file.chmod(0o755)
    slurm.environment["CODA_PYTHON"] = str(program_file)


def job_of(slurm: LocalSlurm, program: str, **values: object) -> Job:
    stand_in(slurm, program, **values)
    return slurm.submit(*SMALL, "slurm/imagenet_coda.sh")


def common(call: str, folder: Path, **environment: str) -> str:
    """Standard output of a function of slurm/common.sh."""
    script = f"source {ROOT}/slurm/common.sh; {call}"
    done = subprocess.run(
        ["bash", "-uc", script],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    return done.stdout.strip()
