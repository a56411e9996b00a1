"""install/: what set-up says where it cannot work, and that it asks what is there. A whole set-up is `make fresh`."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "install"))


def run_setup(folder: Path, *words: str, programs: dict[str, str] | None = None, **environment: str) -> subprocess.CompletedProcess:
    """``install/setup.sh .venv`` in a copy of what it reads; on the PATH are basic tools and ``programs`` (name -> shell script)."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "install", folder / "install", dirs_exist_ok=True)
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("sh", "dirname", "awk", "df", "cat", "cksum", "grep", "id", "rm", "touch", "tail", "env", "sed", "uname", "mkdir"):
        (tools / name).unlink(missing_ok=True)
        (tools / name).symlink_to(str(shutil.which(name)))
    for name, text in (programs or {}).items():
        (tools / name).unlink(missing_ok=True)
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": str(tools), "HOME": str(folder), **environment}
    return subprocess.run(["sh", "install/setup.sh", ".venv", *words], cwd=folder, env=environment, capture_output=True, text=True)


def refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("setup: ") and done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in parts), done.stderr


PYTHON = f'exec "{sys.executable}" "$@"'


def test_no_python_at_all(tmp_path):
    refused(run_setup(tmp_path), "Python 3.11 or newer", "module load python", "make PYTHON=")


def test_older_python_is_passed_over(tmp_path):
    older = 'case "$2" in *version_info*) exit 1 ;; esac'
    refused(run_setup(tmp_path, programs={"python3": older}), "Python 3.11 or newer")
    full = "echo Filesystem; echo 'disk 1 1 1000 1% /'"
    done = run_setup(tmp_path, programs={"python3": older, "python3.12": PYTHON, "df": full})
    refused(done, "GB free")  # it went on with the other one


def test_named_python_that_is_missing(tmp_path):
    refused(
        run_setup(tmp_path, programs={"python3": PYTHON}, PYTHON="/nowhere/python3.11"), "/nowhere/python3.11 is missing or older than 3.11"
    )


def test_python_without_venv(tmp_path):
    without = f'case "$2" in "import venv, ensurepip") exit 1 ;; esac; {PYTHON}'
    version = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    refused(run_setup(tmp_path, programs={"python3": without}), "has no venv", version)
    # apt-get is there, but this user is neither root nor may use sudo
    may_not = {"python3": without, "apt-get": "echo installed >&2; exit 1", "id": "echo 1000", "sudo": "exit 1"}
    refused(run_setup(tmp_path, programs=may_not), "has no venv", version)


def test_processor_for_which_the_systems_libraries_are_needed(tmp_path):
    programs = {"python3": PYTHON, "uname": "echo riscv64"}
    refused(run_setup(tmp_path, programs=programs), "on riscv64 FFCV needs a C++ compiler", "libopencv-dev")
    full = "echo Filesystem; echo 'disk 1 1 1000 1% /'"
    there = {**programs, "pkg-config": '[ "$*" = "--exists opencv4 libturbojpeg" ]', "df": full}
    refused(run_setup(tmp_path, programs=there), "GB free")  # it went on


def test_too_little_room(tmp_path):
    full = "echo Filesystem; echo 'disk 9000000 4000000 5000000 1% /'"
    refused(run_setup(tmp_path, programs={"python3": PYTHON, "df": full}), "has 5 GB free, fewer than the 7.5", "TORCH_INDEX=")
    assert not (tmp_path / ".venv").exists()


def test_wheelhouse_that_is_missing_unfinished_or_for_another_python(tmp_path):
    programs = {"python3": PYTHON}
    refused(run_setup(tmp_path, programs=programs, WHEELHOUSE="nowhere"), "WHEELHOUSE=nowhere is no folder", "make wheelhouse")
    (tmp_path / "wheels").mkdir()
    refused(run_setup(tmp_path, programs=programs, WHEELHOUSE="wheels"), "was not filled to its end")
    (tmp_path / "wheels" / "made-for").write_text("Python 3.9 riscv64 glibc\n")
    refused(run_setup(tmp_path, programs=programs, WHEELHOUSE="wheels"), "is for Python 3.9 riscv64 glibc", "but python3 is Python 3.")


def test_environment_that_is_ready_takes_no_time_and_says_nothing():
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("these tests do not run in the environment that set-up made in .venv")
    start = time.monotonic()
    # Without an interpreter: should it not be ready, nothing is removed or made anew under these tests.
    command = ["make", "--no-print-directory", "ready", "PYTHON=/nowhere/python"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("damage", ["interpreter", "moved", "other project files", "unfinished"])
def test_environment_that_is_not_ready_is_seen(tmp_path, damage):
    """A stand-in for a finished environment, whose own interpreter and pip are all that is looked at."""
    stop = {"PYTHON": "/nowhere/python"}  # set-up that is needed ends there
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").symlink_to(sys.executable)
    (bin_folder / "pip").write_text(f"#!{bin_folder}/python\n")
    (tmp_path / ".venv" / "made-by-setup").touch()
    run_setup(tmp_path, "--if-needed", **stop)  # puts the files there of which the state is made
    state = "printf '%s\\n' ''; cat pyproject.toml constraints.txt install/setup.sh install/*.py install/*.txt"
    checksum = subprocess.run(["sh", "-c", f"{{ {state}; }} | cksum"], cwd=tmp_path, capture_output=True, text=True).stdout
    (tmp_path / ".venv" / "ready").write_text(checksum)
    assert run_setup(tmp_path, "--if-needed", **stop).returncode == 0, "it is ready"
    if damage == "interpreter":
        (bin_folder / "python").unlink()
    elif damage == "moved":
        (bin_folder / "pip").write_text("#!/elsewhere/.venv/bin/python\n")
    elif damage == "unfinished":
        (tmp_path / ".venv" / "ready").unlink()
    else:
        (tmp_path / ".venv" / "ready").write_text("0 0\n")
    refused(run_setup(tmp_path, "--if-needed", **stop), "/nowhere/python is missing")


def test_environment_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "mine").touch()
    refused(run_setup(tmp_path, programs={"python3": PYTHON}), ".venv is there and was not made by this set-up", "make VENV=")
    assert (tmp_path / ".venv" / "mine").exists()


def test_pip_learns_name_and_version_of_an_archive_without_running_it(tmp_path):
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: some-thing\nVersion: 1.2\n\nText\n")
    (tmp_path / "setup.py").write_text("raise SystemExit('was run')\n")
    command = "from setuptools.build_meta import *; import sys; print(prepare_metadata_for_build_wheel(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "install" / "metadata_only")}
    words = [sys.executable, "-c", command, str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "some_thing-1.2.dist-info\n"
    assert (tmp_path / "some_thing-1.2.dist-info" / "METADATA").read_text() == "Metadata-Version: 2.1\nName: some-thing\nVersion: 1.2\n"


def test_source_of_another_release_is_refused(tmp_path):
    import build_ffcv

    (tmp_path / "file.py").write_text("one two one\n")
    build_ffcv.replace(tmp_path / "file.py", ("two", "three"))
    assert (tmp_path / "file.py").read_text() == "one three one\n"
    with pytest.raises(build_ffcv.Failure, match="file.py of this release is not as expected: 'one' stands in it 2 times"):
        build_ffcv.replace(tmp_path / "file.py", ("one", "four"))
