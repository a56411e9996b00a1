"""The wheel and the sdist, built and installed for real.

The tests check what they hold, and what works with the base packages, with none, or with an extra.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import timm
from packaging.requirements import Requirement
from PIL import Image
from recipes_for_tests import small_recipe

from pipeline import __version__
from pipeline.export import export

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))
# Packages that `import pipeline` must not import: they belong to an extra, or are slow.
HEAVY = {
    "ffcv",
    "deepspeed",
    "mlflow",
    "captum",
    "matplotlib",
    "cv2",
    "numba",
    "scipy",
    "skimage",
    "sklearn",
}

ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("PYTHONPATH", "VIRTUAL_ENV", "CODA_TRACEBACK")
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the wheel and the sdist; return their paths in this order."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A virtual environment that holds the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin" / "python",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run(
        [*pip, "--no-index", "--no-deps", "--no-compile", built[0]], check=True, env=ENVIRONMENT
    )
    return folder


def run(installed, *words, code=0, **variables):
    """(stdout, stderr) of a command of the environment that ends with ``code``."""
    command = [installed / "bin" / words[0], *words[1:]]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT | variables, cwd=installed
    )
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.stdout, ended.stderr


def packages(installed, folder, *extras):
    """Fill ``folder`` with links to the installed packages that the wheel needs.

    Args:
        installed: the environment with the wheel.
        folder: an empty folder.
        extras: names of the wheel's extras whose packages are needed, too.

    Returns:
        The folder, for PYTHONPATH.
    """
    (metadata,) = installed.glob("lib/python*/site-packages/coda_pipeline-*.dist-info")
    for name in closure(importlib.metadata.Distribution.at(metadata).requires, extras):
        distribution = importlib.metadata.distribution(name)
        for top in {Path(file).parts[0] for file in distribution.files or ()} - {
            "..",
            "__pycache__",
        }:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return str(folder)


def closure(requirements, extras, known=None):
    """Names of all distributions that ``requirements`` need, directly or through others."""
    known = {} if known is None else known
    for text in requirements or ():
        wanted = Requirement(text)
        if wanted.marker and not any(
            wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        ):
            continue
        if wanted.name in known and wanted.extras <= known[wanted.name]:
            continue
        known[wanted.name] = known.get(wanted.name, set()) | wanted.extras
        closure(importlib.metadata.requires(wanted.name), wanted.extras, known)
    return list(known)


def test_the_wheel_holds_recipes_and_job_scripts_and_no_tests(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        mode = wheel.getinfo("pipeline/slurm/smoke.sh").external_attr >> 16
    assert (
        sorted(Path(name).name for name in names if name.startswith("pipeline/recipes/")) == RECIPES
    )
    scripts = {str(path.relative_to(ROOT)) for path in (ROOT / "slurm").rglob("*.sh")}
    assert {
        name.removeprefix("pipeline/") for name in names if name.startswith("pipeline/slurm/")
    } == scripts
    assert mode & 0o111 == 0o111
    assert not [name for name in names if name.endswith(".toml")]
    assert {name.partition("/")[0] for name in names} == {
        "pipeline",
        f"coda_pipeline-{__version__}.dist-info",
    }


def test_the_wheel_is_typed_and_licensed(built):
    information = f"coda_pipeline-{__version__}.dist-info"
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(f"{information}/METADATA").decode()
        license_text = wheel.read(f"{information}/licenses/LICENSE").decode()
    assert "pipeline/py.typed" in names
    assert "License-Expression: Apache-2.0" in metadata.splitlines()
    assert license_text == (ROOT / "LICENSE").read_text()


def test_the_sdist_holds_what_a_checkout_does(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in (
        "README.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "docs/models.md",
        "slurm/common.sh",
        "tests/test_packaging.py",
    ):
        assert name in names
    assert {f"recipes/{name}" for name in RECIPES} <= names
    assert not [name for name in names if name.startswith((".venv", ".git/", "runs/", "data/"))]


def test_recipes_are_listed_without_any_package(installed):
    text, _ = run(installed, "coda", "recipes")
    assert [line.split()[0] + ".yaml" for line in text.partition("\n\n")[0].splitlines()] == RECIPES
    recipes, scripts = (Path(folder) for folder in re.findall(r"(/\S+/(?:recipes|slurm))\b", text))
    assert recipes.is_relative_to(installed.resolve())
    assert scripts.parent == recipes.parent
    assert (recipes / "digits_resnet20.yaml").is_file()
    assert (scripts / "common.sh").is_file()
    assert run(installed, "python", "-m", "pipeline", "recipes")[0] == text
    assert "prepare" in run(installed, "coda", "--help")[0]


def test_without_torch_a_command_says_so_and_tells_the_job(installed, tmp_path):
    _, line = run(installed, "coda", "train", "digits_resnet20", code=2, CODA_REPORTS=str(tmp_path))
    assert re.fullmatch(LACKS.format("train", re.escape("[train]")) + "\n", line)
    assert (tmp_path / "events-0").read_text() == "mistake 0\n"
    assert re.fullmatch(
        LACKS.format("models", "") + "\n", run(installed, "coda", "models", code=2)[1]
    )


def test_the_doctor_comes_without_any_package(installed):
    text, _ = run(installed, "coda", "doctor", code=2)
    assert "python: " in text
    assert "torch: " in text


LACKS = (
    r"coda: `coda {}` needs [\w.]+, which is not installed: "
    r"pip install 'coda-pipeline{}', or make setup in a checkout"
)
MODELS_ONLY = f"""
import sys, timm, torch, pipeline
loaded = {{name.partition('.')[0] for name in sys.modules}} & {HEAVY!r}
assert not loaded, loaded
model = timm.create_model("coda_resnet50", num_classes=10, conv_stages=3).eval()
images = torch.rand(2, 3, 64, 64)
logits = model(images)
maps = pipeline.contributions(model, images, logits.argmax(1), at="stage3.5")
with pipeline.explanation_mode(model):
    model(images)
assert len(maps) == 2 and pipeline.__version__ == {__version__!r}
from pipeline.cli import main
for words in sys.argv[1:]:
    print("code", main(words.split()), flush=True)
"""


def test_models_plan_and_contributions_need_the_base_packages_only(
    installed, tmp_path_factory, tmp_path
):
    works = ["plan digits_resnet20", "models coda_xs"]
    # Command -> the extra that it needs.
    lacks = {
        "train digits_resnet20": "train",
        "prepare digits_resnet20": "train",
        f"verify {tmp_path}": "train",
        f"evaluate {tmp_path}": "train",
        f"compare {tmp_path}": "train",
        f"explain {tmp_path} {tmp_path}": "explain",
        f"serve --runs {tmp_path}": "server",
    }
    path = packages(installed, tmp_path_factory.mktemp("base"))
    text, errors = run(
        installed,
        "python",
        "-c",
        MODELS_ONLY,
        *works,
        *lacks,
        f"export {tmp_path}",
        PYTHONPATH=path,
    )
    assert re.findall(r"code (\d)", text) == ["0"] * len(works) + ["2"] * (len(lacks) + 1)
    assert "digits_resnet20 on 1 x 8 H100" in text
    assert "| `coda_xs` |" in text
    *missing, no_run = [line for line in errors.splitlines() if line.startswith("coda: ")]
    for line, (command, extra) in zip(missing, lacks.items(), strict=True):
        assert re.fullmatch(LACKS.format(command.split()[0], rf"\[{extra}\]"), line), line
    # `coda export` has all that it needs, and fails only because the folder is not a run.
    assert "holds no recipe.yaml" in no_run


def test_images_are_explained_with_the_extra_of_that_name_only(
    installed, tmp_path_factory, tmp_path
):
    recipe = small_recipe(tmp_path, model__name="coda_xs", model__args={})
    model = timm.create_model("coda_xs", num_classes=10)
    (tmp_path / "run").mkdir()
    export(model, recipe, [str(digit) for digit in range(10)], tmp_path / "run" / "export")
    Image.new("RGB", (20, 16), (40, 10, 10)).save(tmp_path / "red.png")
    path = packages(installed, tmp_path_factory.mktemp("explain"), "explain")
    page, errors = run(
        installed,
        "coda",
        "explain",
        tmp_path / "run",
        tmp_path / "red.png",
        PYTHONPATH=path,
        HOME="/proc/none",
    )
    # No cache is kept in the home, which cannot be written here.
    assert "red.png" in Path(page.strip()).read_text()
    assert "atplotlib" not in errors
