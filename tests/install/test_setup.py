"""Set-up (install/): its messages where it cannot work; what it finds and leaves alone.

A whole set-up is tested by `make fresh`.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "install"))

# All that set-up may need of the system before it has an environment.
TOOLS = (
    *("sh", "dirname", "awk", "df", "cat", "cksum", "grep", "id", "rm", "touch", "tail", "env"),
    *("sed", "uname", "mkdir"),
)


def run_setup(
    folder: Path, *words: str, programs: dict[str, str] | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """``install/setup.sh .venv`` in a copy of what it reads.

    On the PATH are basic tools and ``programs`` (name -> shell script).
    """
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "install", folder / "install", dirs_exist_ok=True)
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in TOOLS:
        (tools / name).unlink(missing_ok=True)
        (tools / name).symlink_to(str(shutil.which(name)))
    for name, text in (programs or {}).items():
        (tools / name).unlink(missing_ok=True)
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": str(tools), "HOME": str(folder), **environment}
    command = ["sh", "install/setup.sh", ".venv", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("setup: ")
    assert done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in parts), done.stderr


PYTHON = f'exec "{sys.executable}" "$@"'


def test_no_python_at_all(tmp_path):
    refused(run_setup(tmp_path), "Python 3.11 or newer", "module load python", "make PYTHON=")


def test_older_python_is_passed_over(tmp_path):
    older = 'case "$2" in *version_info*) exit 1 ;; esac'
    refused(run_setup(tmp_path, programs={"python3": older}), "Python 3.11 or newer")
    full = "echo Filesystem; echo 'disk 1 1 1000 1% /'"
    done = run_setup(tmp_path, programs={"python3": older, "python3.12": PYTHON, "df": full})
    # It went on with the other one.
    refused(done, "GB free")


def test_named_python_that_is_missing(tmp_path):
    done = run_setup(tmp_path, programs={"python3": PYTHON}, PYTHON="/nowhere/python3.11")
    refused(done, "/nowhere/python3.11 is missing or older than 3.11")


def test_python_without_venv(tmp_path):
    without = f'case "$2" in "import venv, ensurepip") exit 1 ;; esac; {PYTHON}'
    version = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    refused(run_setup(tmp_path, programs={"python3": without}), "has no venv", version)
    # There is apt-get, but this user is neither root nor may use sudo.
    may_not = {
        "python3": without,
        "apt-get": "echo installed >&2; exit 1",
        "id": "echo 1000",
        "sudo": "exit 1",
    }
    refused(run_setup(tmp_path, programs=may_not), "has no venv", version)


def test_processor_for_which_the_systems_libraries_are_needed(tmp_path):
    programs = {"python3": PYTHON, "uname": "echo riscv64"}
    done = run_setup(tmp_path, programs=programs)
    refused(done, "on riscv64 FFCV needs a C++ compiler", "libopencv-dev")
    full = "echo Filesystem; echo 'disk 1 1 1000 1% /'"
    there = {**programs, "pkg-config": '[ "$*" = "--exists opencv4 libturbojpeg" ]', "df": full}
    # It went on.
    refused(run_setup(tmp_path, programs=there), "GB free")


def test_too_little_room(tmp_path):
    full = "echo Filesystem; echo 'disk 9000000 4000000 5000000 1% /'"
    done = run_setup(tmp_path, programs={"python3": PYTHON, "df": full})
    refused(done, "has 5 GB free, fewer than the 7.5", "TORCH_INDEX=")
    assert not (tmp_path / ".venv").exists()


def test_wheelhouse_that_is_missing_unfinished_or_for_another_python(tmp_path):
    programs = {"python3": PYTHON}
    done = run_setup(tmp_path, programs=programs, WHEELHOUSE="nowhere")
    refused(done, "WHEELHOUSE=nowhere is not a folder", "make wheelhouse")
    (tmp_path / "wheels").mkdir()
    done = run_setup(tmp_path, programs=programs, WHEELHOUSE="wheels")
    refused(done, "was not filled to its end")
    (tmp_path / "wheels" / "made-for").write_text("Python 3.9 riscv64 glibc\n")
    done = run_setup(tmp_path, programs=programs, WHEELHOUSE="wheels")
    refused(done, "is for Python 3.9 riscv64 glibc", "but python3 is Python 3.")


def test_environment_that_is_ready_takes_no_time_and_says_nothing():
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("these tests do not run in the environment that set-up made in .venv")
    start = time.monotonic()
    # Without an interpreter: were it not ready, nothing is removed or made anew under these tests.
    command = ["make", "--no-print-directory", "ready", "PYTHON=/nowhere/python"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("damage", ["interpreter", "moved", "other project files", "unfinished"])
def test_environment_that_is_not_ready_is_seen(tmp_path, damage):
    """The environment only looks finished: it has an interpreter and a pip, which is enough."""
    # Where set-up is needed it ends here.
    stop = {"PYTHON": "/nowhere/python"}
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").symlink_to(sys.executable)
    (bin_folder / "pip").write_text(f"#!{bin_folder}/python\n")
    (tmp_path / ".venv" / "made-by-setup").touch()
    # This copies the files of which the state is made.
    run_setup(tmp_path, "--if-needed", **stop)
    files = "pyproject.toml constraints.txt install/*.sh install/*.py install/*.txt"
    checksum = ["sh", "-c", f"cat {files} | cksum"]
    state = subprocess.run(checksum, cwd=tmp_path, capture_output=True, text=True)
    (tmp_path / ".venv" / "ready").write_text(state.stdout)
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
    done = run_setup(tmp_path, programs={"python3": PYTHON})
    refused(done, ".venv is there and was not made by this set-up", "make VENV=")
    assert (tmp_path / ".venv" / "mine").exists()


def test_what_has_lost_files_is_found(tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    for name, files in {
        # Python makes the second when somebody runs the first who may write there.
        "whole": "whole.py,,\nwhole.pyc,,\n",
        "broken": "there.py,,\nlost.py,,\n",
        "unlisted": "",
    }.items():
        info = site / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "RECORD").write_text(files)
    for name in ("whole.py", "there.py"):
        (site / name).touch()
    command = [environment / "bin" / "python", "-I", ROOT / "install" / "damaged.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "broken==1.2\n"


def test_build_that_is_stopped_leaves_nothing(tmp_path):
    # It takes connections, and never answers.
    with socket.create_server(("127.0.0.1", 0)) as index:
        place = f"http://127.0.0.1:{index.getsockname()[1]}"
        pip = {"PIP_INDEX_URL": place, "PIP_NO_CACHE_DIR": "1", "PIP_CONFIG_FILE": os.devnull}
        command = [sys.executable, ROOT / "install" / "build_ffcv.py", tmp_path / "wheels"]
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        variables = {**os.environ, **pip, "TMPDIR": str(temporary)}
        variables.pop("PIP_FIND_LINKS", None)
        with subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL) as build:
            index.settimeout(60)
            connection, _ = index.accept()
            assert list(temporary.glob("coda-ffcv-*"))
            build.terminate()
            assert build.wait(60) == 143
        connection.close()
    assert list(temporary.iterdir()) == list((tmp_path / "wheels").iterdir()) == []


def test_pip_learns_name_and_version_of_an_archive_without_running_it(tmp_path):
    head = "Metadata-Version: 2.1\nName: some-thing\nVersion: 1.2\n"
    (tmp_path / "PKG-INFO").write_text(f"{head}\nText\n")
    (tmp_path / "setup.py").write_text("raise SystemExit('was run')\n")
    command = (
        "from setuptools.build_meta import *; import sys; "
        "print(prepare_metadata_for_build_wheel(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "install" / "metadata_only")}
    words = [sys.executable, "-c", command, str(tmp_path)]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "some_thing-1.2.dist-info\n"
    assert (tmp_path / "some_thing-1.2.dist-info" / "METADATA").read_text() == head


def test_source_of_another_release_is_refused(tmp_path):
    import build_ffcv

    (tmp_path / "file.py").write_text("one two one\n")
    build_ffcv.replace(tmp_path / "file.py", ("two", "three"))
    assert (tmp_path / "file.py").read_text() == "one three one\n"
    said = "file.py of this release is not as expected: 'one' is in it 2 times"
    with pytest.raises(build_ffcv.BuildError, match=said):
        build_ffcv.replace(tmp_path / "file.py", ("one", "four"))
