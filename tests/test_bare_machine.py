"""Training needs no compiler, ninja, writable home or network, and prints only what it should."""

import os
import stat
import sys

import pytest
import yaml
from bare import namespaces, run
from output import STDERR, STDOUT, noise
from recipes_for_tests import small_recipe

pytestmark = pytest.mark.skipif(
    not namespaces(),
    reason="this machine allows no mount and network namespaces (`unshare --mount --net`)",
)
CODA = [sys.executable, "-m", "pipeline"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nnodes=1",
    "--nproc-per-node=2",
    "--master-addr=127.0.0.1",
    "--master-port=29517",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small recipe for a run in it."""
    folder = tmp_path_factory.mktemp("bare")
    metrics = {
        "final_metrics": ["accuracy", "completeness", "alignment", "depth"],
        "methods": ["contributions", "gradcam"],
    }
    metrics |= {"grids": 2, "grid_size": 2}
    recipe = small_recipe(folder, training__epochs=1, evaluation=metrics)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    return folder


def test_the_machine_is_bare(folder):
    tools = "for tool in ninja cc c++ gcc g++ as ld; do if command -v $tool; then exit 1; fi; done"
    tools += "; ! touch $HOME/file"
    found = run(["sh", "-c", tools], folder)
    assert found.returncode == 0, found
    for code in (
        "import ctypes; ctypes.CDLL('libgomp.so.1')",
        "import socket; socket.create_connection(('192.0.2.1', 80), 5)",
    ):
        assert run([sys.executable, "-c", code], folder).returncode == 1, code


def test_one_process_trains_to_the_end(folder):
    done = run([*CODA, "train", str(folder / "recipe.yaml")], folder)
    assert done.returncode == 0, done.stderr
    assert noise(done.stderr, STDERR) == []
    assert noise(done.stdout, STDOUT) == []
    trained = folder / "runs" / "small"
    for left in (
        "export/model.safetensors",
        "evaluation.json",
        "pictures/contributions.png",
        "run_id",
    ):
        assert (trained / left).is_file(), left
    caches = folder / "tmp" / f"coda-{os.getuid()}"
    assert stat.S_IMODE(caches.stat().st_mode) == 0o700
    assert list(caches.glob("numba/*/*.nbi"))
    assert list(caches.glob("matplotlib/fontlist*"))
    # Nothing was compiled.
    assert not list(caches.glob("torch-extensions/*"))


def test_what_is_trained_and_evaluated_is_compared(folder):
    for words in (
        ["train", str(folder / "recipe.yaml")],
        ["compare", str(folder / "runs" / "small")],
    ):
        done = run([*CODA, *words], folder)
        assert done.returncode == 0, done.stderr
        assert noise(done.stderr, STDERR) == []
        assert noise(done.stdout, STDOUT) == []
        assert ("resumed" in done.stderr) == (words[0] == "train")


def test_a_new_warning_is_seen():
    assert noise("UserWarning: something new", STDERR)
    assert noise("loading needs 1 GB", STDERR)
    assert noise("Pictures:\nPictures:\n", STDOUT) == ["Pictures:"]


def test_two_processes_train_to_the_end_without_a_home(folder):
    command = [
        *TORCHRUN,
        "-m",
        "pipeline",
        "train",
        str(folder / "recipe.yaml"),
        "name=two",
        "evaluation.final_metrics=[accuracy]",
    ]
    done = run(command, folder, HOME="/nonexistent")
    assert done.returncode == 0, done.stderr
    # Without a network there are no names.
    nameless = (
        r"\[W\S+ .*socket.cpp:\d+\] \[c10d\] "
        r"The hostname of the client socket cannot be retrieved. err=-\d+"
    )
    assert noise(done.stderr, (*STDERR, nameless)) == []
    assert noise(done.stdout, STDOUT) == []
    assert (folder / "runs" / "two" / "run_id").is_file()
    assert not os.path.exists("/nonexistent")


def test_a_machine_without_loopback_is_one_line(folder):
    done = run([*CODA, "train", str(folder / "recipe.yaml"), "name=none"], folder, up=False)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("coda: address 127.0.0.1 of this machine: Network is unreachable")
    )


def test_the_doctor_finds_nothing_wrong(folder):
    done = run([*CODA, "doctor", "--runs", str(folder / "runs")], folder)
    assert done.returncode == 0, done.stdout + done.stderr
