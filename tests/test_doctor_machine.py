"""The doctor's checks of the machine itself, which need no package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import doctor
from pipeline.doctor import machine
from pipeline.doctor.parts import State
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def quick(name, runs, **arguments):
    """The check ``name`` of those that need no package; the checks after it do not run."""
    return next(found for found in doctor.checks(runs, **arguments) if found.name == name)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_time_that_is_not_a_number_of_seconds_is_a_mistake(monkeypatch, text):
    monkeypatch.setenv("CODA_DOCTOR_SECONDS", text)
    with pytest.raises(UserError, match=r"CODA_DOCTOR_SECONDS.*positive number"):
        doctor.main(Path("runs"))


@pytest.mark.parametrize("read_only", ["/proc", "/proc/runs", "/sys/runs"])
def test_runs_folder_that_cannot_be_written(read_only):
    assert quick("runs folder", Path(read_only)).state is State.FAILED


def test_file_in_place_of_the_runs_folder(tmp_path):
    (tmp_path / "file").touch()
    found = quick("runs folder", tmp_path / "file" / "runs")
    assert found.state is State.FAILED
    assert "NotADirectoryError" in found.detail
    assert found.remedy.endswith("runs=FOLDER")


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RUN_BYTES", 1e18)
    found = quick("runs folder", tmp_path)
    assert found.state is State.FAILED
    assert "GB free, fewer than 1e+09 GB" in found.detail


def test_sqlite_on_a_network_file_system_gets_a_warning(tmp_path, monkeypatch):
    assert "not safe" not in quick("runs folder", tmp_path).detail
    monkeypatch.setattr(machine, "NETWORK_FILE_SYSTEMS", (machine.file_system(tmp_path),))
    found = quick("runs folder", tmp_path)
    assert found.state is State.OK
    assert "not safe there: tracking.uri=" in found.detail


def test_recipe_names_the_folders(tmp_path):
    changes = [f"runs={tmp_path}/disk/runs", f"data.prepared={tmp_path}/data"]
    recipe = str(ROOT / "recipes" / "digits_resnet20.yaml")
    (tmp_path / "disk").mkdir()
    assert (
        f"{tmp_path}/disk ("
        in quick("runs folder", Path("/proc"), recipe=recipe, overrides=changes).detail
    )
    found = quick("data folder", Path("/proc"), recipe=recipe, overrides=changes)
    assert found.state is State.OK
    assert "digits-32 is not prepared yet" in found.detail
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
    assert found.state is State.FAILED
    assert "may use 1 of" in found.detail
    assert "--cpus-per-task" in found.remedy


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
    with pytest.raises(MemoryError, match=r"1\.0 GB, fewer than the 2 GB"):
        machine.memory(tmp_path)
    (tmp_path / file).write_text("max\n")
    assert machine.memory(tmp_path) == "65.5 GB available"


def in_mounts(commands, program, folder):
    """Output of a Python program that sees mounts of its own.

    Args:
        commands: of the shell, which make the mounts.
        program: in Python.
        folder: where an empty disk is mounted.
    """
    if os.getuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root that may mount")
    script = f"mount -t tmpfs -o mode=700 none {folder}\n{commands}\nexec {sys.executable} $0"
    source = folder.parent / "coda"
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pipeline.doctor import machine\n"
    source.write_text(f"{head}{program}\n")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, source],
        capture_output=True,
        text=True,
        env=os.environ | {"CODA_CACHE": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REPORT_CACHES = """
try:
    print(machine.caches())
except Exception as error:
    print(machine.one_line(error))
"""


def test_caches_on_a_read_only_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    found = in_mounts(
        f"mount -o remount,ro {tmp_path}/disk; export CODA_CACHE={tmp_path}/disk/caches",
        REPORT_CACHES,
        tmp_path / "disk",
    )
    assert "CODA_CACHE" in found
    assert "Read-only file system" in found


def test_caches_from_which_no_code_can_be_loaded_are_a_failure_only_with_a_gpu(tmp_path):
    """Only Triton's launchers are loaded from a file; numba keeps what it compiles as data."""
    (tmp_path / "disk").mkdir()
    mounted = f"mount -o remount,noexec {tmp_path}/disk; export CODA_CACHE={tmp_path}/disk/caches"
    found = in_mounts(mounted, REPORT_CACHES, tmp_path / "disk")
    assert "is writable" in found
    assert "noexec" in found
    assert found.endswith("with a GPU set CODA_CACHE to a folder elsewhere")
    found = in_mounts(
        f"{mounted}; mount -t tmpfs none /dev; touch /dev/nvidia0 /dev/null",
        REPORT_CACHES,
        tmp_path / "disk",
    )
    assert found.startswith("PermissionError:")
    assert "noexec" in found
