"""Stores for the tests of tracking: SQLite files, and one server as a team has it, for all."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from recipes_for_tests import small_recipe
from tracked import free_port

from pipeline.tracking.store import mlflow_client

ROOT = Path(__file__).resolve().parents[2]
NAME, PASSWORD = "coda", "a long enough pass phrase"
POSTGRESQL = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """An MLflow SQLite file without runs: making one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_database, tmp_path):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="session")
def postgresql():
    """URI of an empty database of a real PostgreSQL; None where Debian's package is missing."""
    if not POSTGRESQL:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="coda-postgresql-"))
    port = free_port()
    programs = POSTGRESQL[-1]
    as_user = (
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        if os.getuid() == 0
        else []
    )
    if as_user:
        shutil.chown(folder, "postgres", "postgres")

    def run(program, *words):
        subprocess.run(
            [*as_user, programs / program, *words],
            check=True,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            timeout=120,
        )

    run("initdb", "-D", folder / "data", "-U", "coda", "-A", "trust", "-E", "UTF8", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run("pg_ctl", "-D", folder / "data", "-o", options, "-l", folder / "log", "-w", "start")
    run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "coda", "mlflow")
    yield f"postgresql://coda@127.0.0.1:{port}/mlflow"
    run("pg_ctl", "-D", folder / "data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


class TeamServer:
    """`coda serve` for a team: reachable from other machines, with a password.

    It has a folder of artifacts and, where there is one, PostgreSQL.
    """

    def __init__(self, folder: Path, database: str | None):
        self.folder, self.port, self.on_postgresql = folder, free_port(), database is not None
        credentials = folder / "credentials"
        credentials.touch(mode=0o600)
        credentials.write_text(
            f"[mlflow]\nmlflow_tracking_username = {NAME}\nmlflow_tracking_password = {PASSWORD}\n"
        )
        options = [
            "--runs",
            folder / "runs",
            "--host",
            "0.0.0.0",
            "--port",
            self.port,
            "--credentials",
            credentials,
        ]
        options += ["--artifacts", folder / "artifacts"]
        self.command = [sys.executable, "-m", "pipeline", "serve", *map(str, options)]
        self.command += ["--backend-store-uri", database] if database else []
        self.uri = f"http://{os.uname().nodename}:{self.port}"

    def start(self) -> None:
        with (self.folder / "server.log").open("a") as log:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_WORKERS": "1"}
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                log_end = (self.folder / "server.log").read_text()[-2000:]
                assert self.process.poll() is None, log_end
                assert time.monotonic() < deadline, log_end
                time.sleep(0.2)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def team(tmp_path_factory, postgresql):
    server = TeamServer(tmp_path_factory.mktemp("team"), postgresql)
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_USERNAME", NAME)
    patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    server.start()
    yield server
    server.kill()
    patch.undo()


@pytest.fixture(scope="session")
def two_runs(team, prepared, tmp_path_factory):
    """Folders of the runs of a hybrid and of the plain network it came from.

    They were trained at the same time against one server, as one sweep.
    """
    folder, processes, folders = tmp_path_factory.mktemp("two"), [], []
    # Confident after a few updates, so that there are grids.
    confident = {"temperature": 1.0, "logit_bias": 1.0}
    evaluation = {
        "metrics": ["accuracy", "completeness"],
        "final_metrics": ["accuracy", "completeness", "pixel_removal", "depth"],
    }
    evaluation |= {"grid_size": 2, "grids": 5, "completeness_images": 16, "removal_images": 8}
    tracking = {
        "uri": team.uri,
        "experiment": "digits",
        "parent": "hybrid and plain",
        "system_metrics": True,
        "log_every_updates": 2,
    }
    for name, model, args in (
        ("hybrid", "coda_resnet20", {"rank": 2, **confident}),
        ("plain", "resnet20", {}),
    ):
        changes = dict(
            name=name,
            runs=str(folder / "runs"),
            data__prepared=str(prepared / "data"),
            training__learning_rate=1e-2,
        )
        recipe = small_recipe(
            folder,
            model={"name": model, "args": args},
            evaluation=evaluation,
            tracking=tracking,
            **changes,
        )
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe.to_dict()))
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",
        }
        with (folder / f"{name}.log").open("w") as log:
            command = [sys.executable, "-m", "pipeline", "train", str(path)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        folders.append(recipe.folder.path)
    for process, name in zip(processes, ("hybrid", "plain"), strict=True):
        assert process.wait(400) == 0, (folder / f"{name}.log").read_text()[-2000:]
    return folders
