"""The doctor's remedies fit the kind of machine."""

import os
import re
from pathlib import Path

import pytest

from pipeline.doctor import remedies
from pipeline.doctor.remedies import Surroundings

ROOT = Path(__file__).resolve().parents[1]
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
    # This user is not root, and there is no sudo.
    assert remedies.surroundings(tmp_path).apt == ""
    (tmp_path / "sudo").write_text("")
    (tmp_path / "sudo").chmod(0o755)
    assert remedies.surroundings(tmp_path).apt == "sudo apt-get install"
    monkeypatch.setenv("APPTAINER_CONTAINER", "/images/coda.sif")
    assert remedies.surroundings(tmp_path).container == "apptainer"
