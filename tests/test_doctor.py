"""``coda doctor``: well where all is installed, and each failure found, named and answered with
what mends it on such a machine.
"""

import http.server
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import free_port

from pipeline import doctor
from pipeline.doctor import machine, probes, remedies
from pipeline.doctor.parts import BASE, LANES, State
from pipeline.doctor.remedies import Surroundings
from pipeline.doctor.remote import Worker
from pipeline.errors import UserError
from pipeline.tracking.store import mlflow_client

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["python", "memory", "processors", "runs folder", "/dev/shm", "caches"]
HEAVY = [name for lane in (BASE, *LANES) for name in lane]
# a busy machine shall not fail the tests
PATIENT = {"CODA_DOCTOR_SECONDS": "300"}
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
# the other is not there
ONE_OF_TWO = TORCHRUN | SRUN
MISSING = "RuntimeError: operator torchvision::nms does not exist"


def run(*words, python=sys.executable, before=(), **variables):
    """(code, stdout, stderr) of ``coda doctor WORDS``."""
    command = [*before, str(python), "-m", "pipeline", "doctor", *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def states(out):
    """name -> (state, detail, remedy)"""
    found, name = {}, ""
    for line in out.splitlines():
        if line.startswith(" "):
            found[name] = (*found[name][:2], line.strip().removeprefix("-> "))
        else:
            name, detail = line[8:].split(": ", 1)
            found[name] = (line[:8].strip(), detail, "")
    return found


def quick(name, runs, **arguments):
    """One of the checks that need no package; those behind it do not run."""
    return next(found for found in doctor.checks(runs, **arguments) if found.name == name)


def test_all_is_well_here_without_programs_on_the_path_and_without_a_home(tmp_path):
    """No compiler, no ninja, no git: as little as a compute node has. And as one of two processes,
    which must not wait for the other.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    recipe = [
        "digits_resnet20",
        f"runs={folder}/runs",
        f"data.prepared={tmp_path}/data",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
    ]
    code, out, err = run(
        *recipe, PATH=str(tmp_path / "empty"), HOME="/proc/nowhere", **ONE_OF_TWO, **PATIENT
    )
    found = states(out)
    assert (code, err) == (0, ""), out + err
    assert list(found) == [*QUICK, "data folder", *HEAVY, "tracking.uri"]
    assert {state for state, *_ in found.values()} == {"ok"}
    assert f"{folder} (" in found["runs folder"][1] and f"SQLite in {folder}" in found["mlflow"][1]
    assert (
        "2 processes on" in found["process group"][1]
        and "made an update on" in found["deepspeed"][1]
    )
    assert "3 JPEG images written, decoded and resized, right within" in found["ffcv"][1]
    assert list(folder.iterdir()) == [], "something was left in the folder of the runs"


def test_bare_environment_says_what_is_missing_and_how_to_get_it(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    start = time.monotonic()
    code, out, err = run(
        "digits_resnet20",
        python=tmp_path / "bare" / "bin" / "python",
        PYTHONPATH=str(ROOT),
        MLFLOW_TRACKING_URI="",
    )
    found = states(out)
    assert (code, err) == (2, ""), out + err
    assert time.monotonic() - start < 20
    failed = {
        name: (detail, remedy)
        for name, (state, detail, remedy) in found.items()
        if state == "FAILED"
    }
    assert list(failed) == ["recipe", "torch", "torchvision", "timm", "deepspeed", "ffcv", "mlflow"]
    assert failed["ffcv"][0] == "the Python package ffcv is not installed"
    assert all("make setup" in remedy for _, remedy in failed.values())
    assert found["process group"] == ("unknown", "cannot be tried without torch, see there", "")
    assert all(found[name][0] == "ok" for name in QUICK)


def test_torchvision_of_another_torch_is_the_one_failure(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    # as the real one does
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    code, out, err = run(PYTHONPATH=str(tmp_path), **PATIENT)
    found = states(out)
    assert (code, err) == (2, ""), out + err
    assert [name for name, (state, *_) in found.items() if state == "FAILED"] == ["torchvision"]
    assert found["torchvision"][1] == MISSING and "made for this torch" in found["torchvision"][2]
    assert found["timm"][:2] == ("unknown", "cannot be tried without torchvision, see there")


def test_broken_torch_is_answered(tmp_path):
    (tmp_path / "torch.py").write_text("import os\nos.abort()\n")
    found = states(run(PYTHONPATH=str(tmp_path), **PATIENT)[1])
    assert found["torch"][:2] == ("FAILED", "its process died of SIGABRT")


def test_slow_machine_is_no_failure(tmp_path):
    start = time.monotonic()
    code, out, _ = run("--runs", tmp_path, CODA_DOCTOR_SECONDS="0.1")
    found = states(out)
    assert code == 1, out
    assert time.monotonic() - start < 20
    assert (
        found["torch"][:2] == ("unknown", "no answer within the 0.1 s of all checks")
        and "CODA_DOCTOR_SECONDS=300" in found["torch"][2]
    )
    assert not [name for name, (state, *_) in found.items() if state == "FAILED"]


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_time_that_is_none_is_a_mistake(monkeypatch, text):
    monkeypatch.setenv("CODA_DOCTOR_SECONDS", text)
    with pytest.raises(UserError, match="CODA_DOCTOR_SECONDS.*positive number"):
        doctor.main(Path("runs"))


def test_probe_that_crashes_hangs_or_raises_leaves_the_next_one_its_turn(tmp_path):
    # a name for which importing the package needs no torch
    program = tmp_path / "coda"
    program.write_text(
        f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pipeline.doctor import worker

lane = [("crash", os.abort), ("killed", lambda: os.kill(os.getpid(), 9)), ("hang", lambda: time.sleep(1000))]
lane += [("raise", lambda: 1 / 0), ("well", lambda: "yes")]
worker.in_turn(1, lane, 1.0)
"""
    )
    out = subprocess.run(
        [sys.executable, program], stdout=subprocess.PIPE, text=True, check=True, timeout=60
    ).stdout
    assert [tuple(json.loads(line)) for line in out.splitlines()] == [
        ("crash", "FAILED", "its process died of SIGABRT"),
        (
            "killed",
            "FAILED",
            "its process died of SIGKILL, which the system sends where memory is short",
        ),
        ("hang", "unknown", "no answer within 1 s"),
        ("raise", "FAILED", "ZeroDivisionError: division by zero"),
        ("well", "ok", "yes"),
    ]


def test_worker_leaves_no_process_behind(tmp_path):
    pid = tmp_path / "pid"
    program = f"""
import subprocess, time
with open({str(pid)!r}, "w") as file:
    file.write(str(subprocess.Popen(["sleep", "1000"]).pid))
time.sleep(1000)
"""
    (tmp_path / "torch.py").write_text(program)
    sys.path.insert(0, str(tmp_path))
    try:
        with Worker(["torch"], tmp_path, {}, time.monotonic() + 60, 60):
            deadline = time.monotonic() + 30
            while not pid.exists() or not pid.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        sys.path.remove(str(tmp_path))
    process = Path("/proc", pid.read_text())
    while process.exists() and "sleep" in (process / "cmdline").read_text():
        assert time.monotonic() < deadline, "the sleeping child is still there"
        time.sleep(0.05)


@pytest.mark.parametrize("read_only", ["/proc", "/proc/runs", "/sys/runs"])
def test_runs_folder_that_cannot_be_written(read_only):
    assert quick("runs folder", Path(read_only)).state is State.FAILED


def test_file_in_place_of_the_runs_folder(tmp_path):
    (tmp_path / "file").touch()
    found = quick("runs folder", tmp_path / "file" / "runs")
    assert (
        found.state is State.FAILED
        and "NotADirectoryError" in found.detail
        and found.remedy.endswith("runs=FOLDER")
    )


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RUN_BYTES", 1e18)
    found = quick("runs folder", tmp_path)
    assert found.state is State.FAILED and "GB free, fewer than 1e+09 GB" in found.detail


def test_sqlite_on_a_network_file_system_gets_a_warning(tmp_path, monkeypatch):
    assert "not safe" not in quick("runs folder", tmp_path).detail
    monkeypatch.setattr(machine, "NETWORK_FILE_SYSTEMS", (machine.file_system(tmp_path),))
    found = quick("runs folder", tmp_path)
    assert found.state is State.OK and "not safe there: tracking.uri=" in found.detail


def test_recipe_names_the_folders(tmp_path):
    changes = [f"runs={tmp_path}/disk/runs", f"data.prepared={tmp_path}/data"]
    recipe = str(ROOT / "recipes" / "digits_resnet20.yaml")
    (tmp_path / "disk").mkdir()
    assert (
        f"{tmp_path}/disk ("
        in quick("runs folder", Path("/proc"), recipe=recipe, overrides=changes).detail
    )
    found = quick("data folder", Path("/proc"), recipe=recipe, overrides=changes)
    assert found.state is State.OK and "digits-32 is not prepared yet" in found.detail
    (tmp_path / "data" / "digits-32").mkdir(parents=True)
    (tmp_path / "data" / "digits-32" / "manifest.json").touch()
    assert quick("data folder", Path("/proc"), recipe=recipe, overrides=changes).detail.endswith(
        "digits-32 is prepared"
    )
    with pytest.raises(UserError, match="trainig"):
        doctor.main(tmp_path, recipe, ["trainig.epochs=1"])


def test_job_bound_to_one_processor(tmp_path):
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        found = quick("processors", tmp_path)
    finally:
        os.sched_setaffinity(0, allowed)
    assert (
        found.state is State.FAILED
        and "may use 1 of" in found.detail
        and "--cpus-per-task" in found.remedy
    )


def test_machine_of_one_processor_is_no_failure(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert machine.processors() == "this process may use 1 of 1"


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/job", "sys/fs/cgroup/job/memory.max"),
        ("4:cpu,memory:/a/b", "sys/fs/cgroup/memory/a/memory.limit_in_bytes"),
    ],
    ids=["version 2", "version 1, of a group above"],
)
def test_memory_limit_of_a_job(tmp_path, line, file):
    for name, text in {
        "proc/meminfo": "MemAvailable: 64000000 kB\n",
        "proc/self/cgroup": f"{line}\n",
        file: "3000000000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert (
        machine.memory(tmp_path)
        == "65.5 GB available, of which this job or container may use 3.0 GB"
    )
    (tmp_path / file).write_text("1000000000\n")
    with pytest.raises(MemoryError, match="1.0 GB, fewer than the 2 GB"):
        machine.memory(tmp_path)
    (tmp_path / file).write_text("max\n")
    assert machine.memory(tmp_path) == "65.5 GB available"


def in_mounts(commands, program, folder):
    """Output of a Python program that sees mounts of its own."""
    if os.getuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root that may mount")
    script = f"mount -t tmpfs -o mode=700 none {folder}\n{commands}\nexec {sys.executable} $0"
    source = folder.parent / "coda"
    source.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pipeline.doctor import machine\n{program}\n"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, source],
        capture_output=True,
        text=True,
        env=os.environ | {"CODA_CACHE": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CACHES = """
try:
    print(machine.caches())
except Exception as error:
    print(machine.one_line(error))
"""


def test_caches_on_a_read_only_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    found = in_mounts(
        f"mount -o remount,ro {tmp_path}/disk; export CODA_CACHE={tmp_path}/disk/caches",
        CACHES,
        tmp_path / "disk",
    )
    assert "CODA_CACHE" in found and "Read-only file system" in found


def test_caches_from_which_no_code_can_be_loaded_are_a_failure_only_with_a_gpu(tmp_path):
    """numba keeps what it compiles as data; only Triton's launchers are loaded from a file."""
    (tmp_path / "disk").mkdir()
    mounted = f"mount -o remount,noexec {tmp_path}/disk; export CODA_CACHE={tmp_path}/disk/caches"
    found = in_mounts(mounted, CACHES, tmp_path / "disk")
    assert (
        "is writable" in found
        and "noexec" in found
        and found.endswith("with a GPU set CODA_CACHE to a folder elsewhere")
    )
    found = in_mounts(
        f"{mounted}; mount -t tmpfs none /dev; touch /dev/nvidia0 /dev/null",
        CACHES,
        tmp_path / "disk",
    )
    assert found.startswith("PermissionError:") and "noexec" in found


@contextmanager
def server(status):
    """Address of a server that answers everything with ``status``; with None it takes connections
    and says nothing.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if status is None:
                stop.wait(30)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"go away")

        do_POST = do_GET

        def log_message(self, *_):
            pass

    stop = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            stop.set()
            running.shutdown()
            thread.join()


@pytest.fixture
def track(monkeypatch):
    """An address -> what the tracking check says, in two seconds at most."""
    monkeypatch.setattr(probes, "ADDRESS_SECONDS", 2)
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        # restored afterwards
        monkeypatch.setenv(name, "7")

    def track(uri, name="tracking.uri"):
        start = time.monotonic()
        try:
            return f"ok: {probes.tracking(name, uri)}"
        except Exception as error:
            return machine.without_passwords(machine.one_line(error))
        finally:
            assert time.monotonic() - start < 20

    # imports MLflow, which is not to be timed
    mlflow_client("http://127.0.0.1:1")
    return track


REMEDY = remedies.remedies(Surroundings())


@pytest.mark.parametrize(
    ("status", "words", "remedy"),
    [
        (403, "403", "MLFLOW_TRACKING_USERNAME"),
        (500, "500", "coda serve"),
        (None, "timed out", "coda serve"),
    ],
)
def test_tracking_server_that_refuses_fails_or_hangs(track, status, words, remedy):
    with server(status) as address:
        found = track(address)
    assert not found.startswith("ok") and words in found.lower()
    assert remedy in REMEDY("tracking.uri", found)


def test_tracking_address_that_nobody_answers(track):
    found = track(f"http://127.0.0.1:{free_port()}")
    assert not found.startswith("ok") and "refused" in found.lower()
    assert "`coda sync` sends what is missing" in REMEDY("tracking.uri", found)


def test_something_else_than_mlflow_answers(track):
    with server(200) as address:
        assert not track(address).startswith("ok")


@pytest.mark.parametrize("name", ["tracking.uri", "MLFLOW_TRACKING_URI"])
@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter/2@127.0.0.1:1",
        "http://me:hunter%202@127.0.0.1:1",
        "postgresql+psycopg://me:hunter2@127.0.0.1:1/x",
    ],
)
def test_no_password_is_printed(track, uri, name):
    found = track(uri, name)
    assert not found.startswith("ok") and "hunter" not in found


def test_sqlite_address(track, tmp_path):
    assert track(f"sqlite:///{tmp_path}/new/mlflow.db").startswith(
        f"ok: sqlite file {tmp_path}/new/mlflow.db: {tmp_path} ("
    )
    assert not (tmp_path / "new").exists()
    assert "sqlite" in REMEDY("tracking.uri", f"sqlite:///{tmp_path}")
    assert "Error" in track("sqlite:////proc/mlflow.db")
    database = tmp_path / "mlflow.db"
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("CREATE TABLE runs (id)")
    assert track(f"sqlite:///{database}").startswith("ok: ")
    holder.execute("BEGIN EXCLUSIVE")
    assert "database is locked" in track(f"sqlite:///{database}")
    holder.close()


def test_mlflows_variable_is_looked_at_and_said_to_be_unread(track, tmp_path, monkeypatch):
    assert track(f"sqlite:///{tmp_path}/mlflow.db", "MLFLOW_TRACKING_URI").endswith(
        "trainings do not read this variable: recipes have tracking.uri"
    )
    assert track("databricks", "MLFLOW_TRACKING_URI").startswith(
        "ok: 'databricks' is no address that is tried here"
    )
    assert machine.tracking_variable() == {}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert machine.tracking_variable() == {"MLFLOW_TRACKING_URI": "http://server:5000"}


MACHINES = {
    "root on Debian": Surroundings(apt="apt-get install", checkout=True),
    "login node": Surroundings(modules=True, checkout=True),
    "container": Surroundings(container="docker"),
    "apptainer in a job": Surroundings(container="apptainer", slurm=True),
    "user": Surroundings(),
}


@pytest.mark.parametrize(
    ("kind", "name", "detail", "expected"),
    [
        ("root on Debian", "ffcv", "the Python package ffcv is not installed", "make setup"),
        (
            "user",
            "ffcv",
            "the Python package ffcv is not installed",
            r"pip install 'coda-pipeline\[train\]'",
        ),
        ("container", "ffcv", "the Python package ffcv is not installed", "container's image"),
        (
            "root on Debian",
            "ffcv",
            "ImportError: libGL.so.1: cannot open shared object file: No such",
            "apt-get install libgl1",
        ),
        (
            "login node",
            "ffcv",
            "ImportError: libstdc++.so.6: cannot open shared object file: No such",
            r"module spider libstdc\+\+",
        ),
        (
            "container",
            "ffcv",
            "ImportError: libGL.so.1: cannot open shared object file: No such",
            "libGL.so.1 into the container",
        ),
        (
            "user",
            "ffcv",
            "ImportError: libGL.so.1: cannot open shared object file: No such",
            "without root",
        ),
        ("root on Debian", "python", "", "apt-get install python3.11"),
        ("login node", "python", "", "module avail python"),
        ("user", "python", "", "in your own folder"),
        ("container", "/dev/shm", "", "--shm-size=8g"),
        ("apptainer in a job", "/dev/shm", "", "--contain"),
        ("container", "gpu", "", "--gpus all"),
        ("apptainer in a job", "gpu", "", "--nv"),
        (
            "root on Debian",
            "kernels",
            "RuntimeError: Failed to find C compiler",
            "apt-get install gcc",
        ),
        ("login node", "kernels", "RuntimeError: Failed to find C compiler", "module load gcc"),
        ("user", "deepspeed", "UserError: the loopback interface must be up", "getent hosts"),
    ],
)
def test_remedies_fit_the_machine(kind, name, detail, expected):
    remedy = remedies.remedies(MACHINES[kind])(name, detail)
    assert re.search(expected, remedy)
    assert "apt-get" not in remedy or MACHINES[kind].apt


def test_kind_of_machine_is_seen(tmp_path, monkeypatch):
    for name in (
        "MODULEPATH",
        "LMOD_CMD",
        "APPTAINER_CONTAINER",
        "SINGULARITY_CONTAINER",
        "SLURM_JOB_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert remedies.surroundings(tmp_path, tmp_path) == Surroundings()
    for program in ("apt-get", "modulecmd"):
        (tmp_path / program).write_text("")
        (tmp_path / program).chmod(0o755)
    (tmp_path / ".dockerenv").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr(os, "getuid", lambda: 0)
    found = remedies.surroundings(tmp_path, ROOT)
    assert found == Surroundings(
        apt="apt-get install", modules=True, container="docker", checkout=True, slurm=True
    )
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    # neither root nor sudo
    assert remedies.surroundings(tmp_path).apt == ""
    (tmp_path / "sudo").write_text("")
    (tmp_path / "sudo").chmod(0o755)
    assert remedies.surroundings(tmp_path).apt == "sudo apt-get install"
    monkeypatch.setenv("APPTAINER_CONTAINER", "/images/coda.sif")
    assert remedies.surroundings(tmp_path).container == "apptainer"
