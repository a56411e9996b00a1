"""Caches lie in one private folder on this node, whatever the home is."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.caches import CACHES, use_local_caches
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The temporary folder of a process that has not chosen its caches yet."""
    for variable in (*CACHES, "CODA_CACHE"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_every_cache_has_a_private_folder(temporary):
    folder = use_local_caches()
    assert folder == temporary / f"coda-{os.getuid()}"
    for path in (folder, *(Path(os.environ[variable]) for variable in CACHES)):
        assert path.is_relative_to(folder)
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert use_local_caches() == folder == Path(os.environ["CODA_CACHE"])


def test_what_the_user_has_set_stays(temporary, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("CODA_CACHE", str(temporary / "deep" / "mine"))
    assert use_local_caches() == temporary / "deep" / "mine"
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
    assert not (temporary / "deep" / "mine" / "triton").exists()
    assert os.environ["NUMBA_CACHE_DIR"] == str(temporary / "deep" / "mine" / "numba")


def _open_to_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def _a_link(path: Path) -> None:
    path.with_name("real").mkdir(mode=0o700)
    path.symlink_to(path.with_name("real"))


def _a_file(path: Path) -> None:
    path.touch()


def _of_somebody_else(path: Path) -> None:
    path.mkdir(mode=0o700)
    try:
        os.chown(path, os.getuid() + 1, -1)
    except PermissionError:
        pytest.skip("only root can give a folder away")


@pytest.mark.parametrize("plant", [_open_to_all, _a_link, _a_file, _of_somebody_else])
def test_a_folder_that_others_could_fill_is_not_used(temporary, plant):
    planted = temporary / f"coda-{os.getuid()}"
    plant(planted)
    # A command line of this name imports the package without the models.
    program = temporary / "coda"
    program.write_text(
        "from pipeline.caches import use_local_caches; import os\n"
        "print(use_local_caches(), os.environ['NUMBA_CACHE_DIR'])\n"
    )
    variables = {name: value for name, value in os.environ.items() if value} | {
        "TMPDIR": str(temporary),
        "PYTHONPATH": str(ROOT),
    }
    answer = subprocess.run(
        [sys.executable, str(program)], env=variables, capture_output=True, text=True, check=True
    )
    folder, numba = answer.stdout.split()
    assert Path(folder).parent == temporary
    assert folder != str(planted)
    assert numba == f"{folder}/numba"
    # It goes with its process.
    assert not Path(folder).exists()
    assert planted.is_symlink() or planted.is_file() or not list(planted.iterdir())


@pytest.mark.parametrize("plant", [_open_to_all, _a_file])
def test_a_chosen_folder_that_is_unsafe_is_one_line(temporary, monkeypatch, plant):
    chosen = temporary / "chosen"
    plant(chosen)
    monkeypatch.setenv("CODA_CACHE", str(chosen))
    with pytest.raises(UserError, match=f"CODA_CACHE is {chosen}: .*; it must be a folder"):
        use_local_caches()


def test_numba_keeps_what_it_compiles_there(temporary):
    # Numba is imported first, and has looked for its folder already.
    load = "from pipeline.data.ffcv_library import load_ffcv; load_ffcv()"
    program = f"import numba; {load}; print(numba.config.CACHE_DIR)"
    variables = {name: value for name, value in os.environ.items() if value} | {
        "CODA_CACHE": str(temporary / "mine")
    }
    answer = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == str(temporary / "mine" / "numba")
