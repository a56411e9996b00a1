"""Every mistake of a user ends in one line, exit code 2, and nothing half-written."""

import errno
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.error import URLError

import pytest
import requests
import yaml
from PIL import Image
from recipes_for_tests import small_recipe

from pipeline.cli import commands, main
from pipeline.recipe.ready_made import find_recipe, recipes, shipped_folder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def recipe_file(tmp_path):
    """Function that writes a recipe to a file: changes -> path."""

    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(small_recipe(tmp_path, **changes).to_dict()))
        return str(path)

    return write


def fails(capsys, arguments, *words):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().split("\n")[-1].split("\r")[-1]
    assert last.startswith("coda: ")
    assert "Traceback" not in captured.err
    for word in words:
        assert word in last, last


def images(folder, broken=None):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (20, 16), (40 * index, 10, 10)).save(
                    folder / split / label / f"{index}.png"
                )
    if broken:
        (folder / broken).write_bytes((folder / broken).read_bytes()[:40])
    return folder


def test_a_misspelt_key(recipe_file, capsys):
    fails(
        capsys,
        ["train", recipe_file(), "training.epoch=1"],
        "training.epoch",
        "did you mean training.epochs?",
    )


def test_a_missing_recipe(capsys, tmp_path):
    fails(capsys, ["train", str(tmp_path / "none.yaml")], "none.yaml")


def test_a_ready_made_recipe_goes_by_its_name(capsys, tmp_path, monkeypatch):
    assert set(recipes()) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert shipped_folder("slurm") == ROOT / "slurm"
    monkeypatch.chdir(tmp_path)
    # This is a run of that name.
    (tmp_path / "digits_resnet20").mkdir()
    assert find_recipe("digits_resnet20") == ROOT / "recipes" / "digits_resnet20.yaml"
    assert find_recipe("digits_resnet20.yaml") == Path("digits_resnet20.yaml")
    assert find_recipe("mine/digits_resnet20") == Path("mine/digits_resnet20")
    (tmp_path / "digits_coda_resnet20").write_text("name: mine\n")
    assert find_recipe("digits_coda_resnet20") == Path("digits_coda_resnet20")
    for command in ("train", "prepare", "plan", "verify", "doctor"):
        fails(
            capsys, [command, "digits_resnet2O"], "digits_resnet2O", "did you mean digits_resnet20?"
        )
    fails(
        capsys,
        ["plan", "digits_resnet20", "training.epoch=1"],
        "digits_resnet20.yaml",
        "training.epoch",
    )


def test_every_ready_made_recipe_says_what_it_is(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == list(recipes())
    assert all(len(line.split()) > 4 and ":" not in line.split()[1] for line in lines)


@pytest.mark.parametrize(
    ("number", "event"),
    [
        *(
            (number, "disk")
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
        ),
        *(
            (number, "mistake")
            for number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, None)
        ),
    ],
)
def test_only_a_disk_that_is_full_or_failing_is_worth_another_try(
    number, event, capsys, tmp_path, monkeypatch
):
    def raises():
        raise (
            OSError(number, "what the system says", "/a/file")
            if number
            else OSError("libx.so: cannot open shared object file")
        )

    monkeypatch.setattr(commands, "listing", raises)
    monkeypatch.setenv("CODA_REPORTS", str(tmp_path))
    fails(capsys, ["recipes"], "/a/file" if number else "libx.so")
    assert (tmp_path / "events-0").read_text() == f"{event} 0\n"


NOT_UNDERSTOOD = [
    # These name no file.
    *(OSError(number, "x") for number in (errno.EINVAL, errno.ETIMEDOUT, errno.EACCES)),
    *(ConnectionResetError("x"), TimeoutError("x"), ValueError("x"), OSError("in words")),
    # These are OSErrors of the network.
    *(requests.ConnectionError("x"), URLError("x")),
]


@pytest.mark.parametrize("error", NOT_UNDERSTOOD, ids=repr)
def test_what_is_not_understood_keeps_its_traceback(error, tmp_path, monkeypatch):
    def raises():
        raise error

    monkeypatch.setattr(commands, "listing", raises)
    monkeypatch.setenv("CODA_REPORTS", str(tmp_path))
    with pytest.raises(type(error)):
        main(["recipes"])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(capsys):
    fails(capsys, ["serve", "--runs", "/proc/none/runs"], "/proc/none")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("torch.so", "no library", "torch.so"),
        (
            "torch.py",
            "import ctypes; ctypes.CDLL('libnone.so.1')",
            "libnone.so.1: cannot open shared object file",
        ),
        (
            "torch.py",
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "operator torchvision::nms does not exist; `coda doctor`",
        ),
        (
            "torch.py",
            "import nothing.of_the_kind",
            "needs nothing, which is not installed: pip install 'coda-pipeline[train]'",
        ),
    ],
)
def test_a_package_that_cannot_be_imported(file, content, said, tmp_path):
    (tmp_path / file).write_text(content)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CODA_REPORTS": str(tmp_path)}
    words = [sys.executable, "-m", "pipeline", "train", "digits_resnet20"]
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("coda: `coda train` ")
    assert said in run.stderr
    assert (tmp_path / "events-0").read_text() == "mistake 0\n"
    shown = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, env=environment | {"CODA_TRACEBACK": "1"}
    )
    assert shown.returncode == 2
    assert shown.stderr.startswith("Traceback")
    assert shown.stderr.endswith(run.stderr)


def test_a_missing_data_folder(recipe_file, tmp_path, capsys):
    fails(
        capsys,
        ["prepare", recipe_file(data__source="imagefolder", data__path=str(tmp_path / "none"))],
        "none",
    )
    assert not list((tmp_path / "data").glob("*/*.beton"))


def test_an_unknown_source(recipe_file, capsys):
    fails(capsys, ["prepare", recipe_file(data__source="digit")], "digit", "digits")


def test_a_broken_image(recipe_file, tmp_path, capsys):
    folder = images(tmp_path / "images", broken="train/dog/1.png")
    fails(
        capsys,
        ["prepare", recipe_file(data__source="imagefolder", data__path=str(folder))],
        "dog/1.png",
    )
    assert not [
        path for path in (tmp_path / "data").rglob("*") if path.is_file() and path.name != ".lock"
    ]


def test_a_beton_cut_short(recipe_file, tmp_path, capsys):
    path = recipe_file()
    assert main(["prepare", path]) == 0
    beton = tmp_path / "data" / "digits-8" / "train.beton"
    beton.write_bytes(beton.read_bytes()[:-1000])
    fails(capsys, ["train", path], "train.beton")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__name": "coda_resnet2O"}, ["coda_resnet20"]),
        ({"model__args": {"ranks": 3}}, ["ranks"]),
        ({"model__args": {"temperature": -1}}, ["temperature", "positive"]),
        ({"model__name": "coda_resnet20", "model__args": {"conv_stages": 9}}, ["conv_stages"]),
        ({"training__global_batch_size": 5000}, ["global_batch_size", "1437"]),
        ({"tracking": {"uri": "ftp://x"}}, ["tracking.uri"]),
    ],
)
def test_values_that_do_not_fit(recipe_file, prepared, capsys, changes, words):
    fails(capsys, ["train", recipe_file(data__prepared=str(prepared / "data"), **changes)], *words)


@pytest.mark.parametrize("command", ["evaluate", "export", "compare", "sync"])
def test_a_folder_that_is_no_run(command, tmp_path, capsys):
    fails(capsys, [command, str(tmp_path)], str(tmp_path))


def test_a_tar_that_is_none(recipe_file, tmp_path, capsys):
    path = tmp_path / "images.tar"
    path.write_bytes(b"no tar")
    fails(
        capsys, ["prepare", recipe_file(data__source="cifar10", data__path=str(path))], "images.tar"
    )
    with tarfile.open(path, "w"):
        pass
    fails(
        capsys, ["prepare", recipe_file(data__source="cifar10", data__path=str(path))], "images.tar"
    )


def test_the_whole_way(recipe_file, prepared, tmp_path, capsys):
    path = recipe_file(
        data__prepared=str(prepared / "data"),
        evaluation={"final_metrics": ["accuracy", "completeness"]},
        training__epochs=1,
    )
    assert main(["train", path]) == 0
    table = capsys.readouterr().out
    assert " serve --backend-store-uri sqlite:///" in table
    assert "compareRunsMode=CHART" in table
    run = str(tmp_path / "runs" / "small")
    evaluation = (tmp_path / "runs" / "small" / "evaluation.json").read_text()
    assert main(["export", run]) == 0
    assert main(["evaluate", run]) == 0
    assert (tmp_path / "runs" / "small" / "evaluation.json").read_text() == evaluation
    assert main(["evaluate", run + "/export"]) == 0
    assert main(["compare", run, run]) == 0
    assert capsys.readouterr().out.count("\nsmall ") >= 3


def test_the_module_is_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0
    assert "prepare" in run.stdout
