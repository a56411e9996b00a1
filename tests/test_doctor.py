"""``coda doctor`` as a command: well where all is installed, and each failure found and named."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pipeline.doctor.parts import BASE, LANES
from pipeline.doctor.remote import Worker

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["python", "memory", "processors", "runs folder", "/dev/shm", "caches"]
HEAVY = [name for lane in (BASE, *LANES) for name in lane]
# A busy machine shall not fail the tests.
PATIENT = {"CODA_DOCTOR_SECONDS": "300"}
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
# The variables of one of two processes, of which the other is not there.
ONE_OF_TWO = TORCHRUN | SRUN
NO_OPERATOR = "RuntimeError: operator torchvision::nms does not exist"


def run(*words, python=sys.executable, before=(), **variables):
    """(code, stdout, stderr) of ``coda doctor WORDS``."""
    command = [*before, str(python), "-m", "pipeline", "doctor", *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def states(out):
    """The lines that were printed, as name -> (state, detail, remedy)."""
    found, name = {}, ""
    for line in out.splitlines():
        if line.startswith(" "):
            found[name] = (*found[name][:2], line.strip().removeprefix("-> "))
        else:
            name, detail = line[8:].split(": ", 1)
            found[name] = (line[:8].strip(), detail, "")
    return found


def test_all_is_well_here_without_programs_on_the_path_and_without_a_home(tmp_path):
    """No compiler, no ninja, no git: as little as a compute node has.

    The doctor is one of two processes here, and must not wait for the other.
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
    assert f"{folder} (" in found["runs folder"][1]
    assert f"SQLite in {folder}" in found["mlflow"][1]
    assert "2 processes on" in found["process group"][1]
    assert "made an update on" in found["deepspeed"][1]
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
    # The real one raises the same.
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    code, out, err = run(PYTHONPATH=str(tmp_path), **PATIENT)
    found = states(out)
    assert (code, err) == (2, ""), out + err
    assert [name for name, (state, *_) in found.items() if state == "FAILED"] == ["torchvision"]
    assert found["torchvision"][1] == NO_OPERATOR
    assert "made for this torch" in found["torchvision"][2]
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
    assert found["torch"][:2] == ("unknown", "no answer within the 0.1 s of all checks")
    assert "CODA_DOCTOR_SECONDS=300" in found["torch"][2]
    assert not [name for name, (state, *_) in found.items() if state == "FAILED"]


def test_probe_that_crashes_hangs_or_raises_leaves_the_next_one_its_turn(tmp_path):
    # Under this name importing the package needs no torch.
    program = tmp_path / "coda"
    program.write_text(
        f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pipeline.doctor import worker

lane = [
    ("crash", os.abort),
    ("killed", lambda: os.kill(os.getpid(), 9)),
    ("hang", lambda: time.sleep(1000)),
    ("raise", lambda: 1 / 0),
    ("well", lambda: "yes"),
]
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
