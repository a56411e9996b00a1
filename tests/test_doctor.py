"""``coda doctor``: well where all is installed, and each failure found, named and answered with its remedy."""

import os
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from pipeline import doctor

APT = "apt-get install libopencv-dev libturbojpeg0-dev pkg-config build-essential python3-dev"
NAMES = ["python", "compiler", "libraries", "processors", "runs folder", "/dev/shm", "torch"]
ISOLATED = ["ffcv", "process group", "nccl", "deepspeed", "mlflow"]


def check(name: str, folder: Path) -> doctor.Check:
    """One of the quick checks; the slow ones behind it do not run."""
    return next(found for found in doctor.checks(folder) if found.name == name)


def test_all_is_well_here(tmp_path, capfd):
    code = doctor.main(tmp_path / "runs" / "not" / "there")
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert code == 0, out
    assert [line.split(":")[0] for line in lines] == [f"{'ok':8}{name}" for name in NAMES + ISOLATED]
    assert err == "", "a building block's noise came through"
    assert f"runs folder: {tmp_path} (" in out and not (tmp_path / "runs").exists()
    assert "2 processes on" in out and "4 images written and read" in out and "SQLite written and read" in out


def test_everything_that_fails_has_its_remedy_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_SECONDS", 0.0)  # no process answers so soon
    start = time.monotonic()
    assert doctor.main(Path("/proc/runs")) == 2
    assert time.monotonic() - start < 30
    lines = capsys.readouterr().out.splitlines()
    failed = {line[8:].split(":")[0]: (line, lines[number + 1]) for number, line in enumerate(lines) if line.startswith("FAILED")}
    assert list(failed) == ["compiler", "libraries", "runs folder", *ISOLATED]
    assert all(remedy.startswith(f"{'':8}-> ") and len(remedy) > 20 for _, remedy in failed.values())
    assert all("no answer within 0 s" in failed[name][0] for name in ISOLATED)


def test_missing_compiler_and_libraries_are_answered_with_the_apt_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    compiler, libraries = check("compiler", tmp_path), check("libraries", tmp_path)
    assert not compiler.ok and "no c++ on the PATH" in compiler.detail and compiler.remedy == APT
    assert not libraries.ok and "pkg-config" in libraries.detail and libraries.remedy == APT


def test_missing_python_headers_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    found = check("compiler", tmp_path)
    assert not found.ok and "Python.h" in found.detail and found.remedy == APT


def test_library_that_pkg_config_does_not_know_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PKG_CONFIG_LIBDIR", str(tmp_path))
    monkeypatch.delenv("PKG_CONFIG_PATH", raising=False)
    found = check("libraries", tmp_path)
    assert not found.ok and "opencv4" in found.detail


@pytest.mark.parametrize("read_only", ["/proc", "/proc/runs", "/sys/runs"])
def test_runs_folder_that_cannot_be_written(read_only):
    assert not check("runs folder", Path(read_only)).ok


def test_file_in_place_of_the_runs_folder(tmp_path):
    (tmp_path / "file").touch()
    found = check("runs folder", tmp_path / "file" / "runs")
    assert not found.ok and "NotADirectoryError" in found.detail


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_RUN_BYTES", 1e18)
    found = check("runs folder", tmp_path)
    assert not found.ok and "GB free, fewer than 1000000000.0 GB" in found.detail


def test_sqlite_on_a_network_file_system_gets_a_warning(tmp_path, monkeypatch):
    assert "not safe" not in check("runs folder", tmp_path).detail
    monkeypatch.setattr(doctor, "NETWORK_FILE_SYSTEMS", (doctor.file_system(tmp_path),))
    found = check("runs folder", tmp_path)
    assert found.ok and "not safe there: tracking.uri=" in found.detail


def test_job_bound_to_one_processor(tmp_path):
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        found = check("processors", tmp_path)
    finally:
        os.sched_setaffinity(0, allowed)
    assert not found.ok and "may use 1 of" in found.detail and "--cpus-per-task" in found.remedy


def test_crash_in_native_code_is_a_failed_check():
    found = doctor._check("crash", partial(doctor._isolated, os.abort), "remedy")
    assert found == doctor.Check("crash", False, "RuntimeError: its process died with code -6", "remedy")


def test_isolated_check_leaves_no_process_behind():
    pid = int(doctor._isolated(partial(subprocess.getoutput, "sleep 1000 >/dev/null 2>&1 & echo $!")))
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "sleep" in Path(f"/proc/{pid}/cmdline").read_text():
        assert time.monotonic() < deadline, "the sleeping child is still there"
        time.sleep(0.05)
