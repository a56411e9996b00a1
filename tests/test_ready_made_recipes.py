"""Every ready-made recipe has a complete header, is planned, and takes three real steps.

The steps are at the recipe's own resolution, on a few small pictures.
"""

import re
from pathlib import Path

import pytest
import torch
from data.small_data import write_images
from runs_for_tests import StartedRun

from pipeline.data.prepare import prepare
from pipeline.distributed import process_group
from pipeline.planning.cluster import Cluster
from pipeline.planning.gpus import GPUS
from pipeline.planning.plan import Plan
from pipeline.planning.report import gpu_report
from pipeline.recipe.load import load

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))
STEPS = 3
# Sources whose images are stored at the model's size.
FIXED = ("digits", "cifar10", "tinyimagenet")
# Overrides of networks that are slow at their own sizes.
AFFORDABLE = {
    "coda_l": ["model.args.rank=2"],
    "coda_xl": ["model.args.rank=4"],
    "coda_s": ["model.args.rank=4"],
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_says_source_command_expectation_and_cost(path):
    header = re.match(r"(#.*\n)+", path.read_text()).group()
    for word in ("Source:|Paper:", "Command:", "Expected:", "Cost:"):
        assert re.search(f"^# ({word}) +[^ \n]", header, re.MULTILINE), (
            f"{path.name} has no line {word}"
        )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_is_planned(path):
    recipe = load(path, ["data.progressive=null"])
    plan, cluster = Plan(recipe), Cluster(1, 1, GPUS["h100"])
    text = gpu_report(plan, cluster)
    assert recipe.model.name in text
    assert "nothing here was measured on a GPU" in text
    # An H100 computes at most 1e15 operations a second, and should reach a hundredth of that.
    step = float(re.search(r"^step +([\d.]+) ms for", text, re.MULTILINE).group(1)) / 1000
    images, size = recipe.training.global_batch_size, recipe.data.image_size
    work = 3 * 2 * images * plan.workload.multiply_adds(size)
    assert max(work / 1e15, 1e-3) < step < max(work / 1e13, 0.1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Make overrides that give a recipe a few pictures, prepared once for each source."""
    folder = tmp_path_factory.mktemp("pictures")
    write_images(folder / "small", train=4, val=2, test=2)

    def overrides(recipe):
        source = "cifar10" if recipe.data.source in FIXED else "imagefolder"
        changed = [
            f"data.source={source}",
            f"data.path={folder / 'small'}",
            f"data.prepared={folder}",
            "data.workers=1",
        ]
        small = load_again(recipe, changed)
        if not small.data.folder.exists():
            prepare(small)
        return changed

    return overrides


def load_again(recipe, overrides):
    path = next(path for path in RECIPES if path.stem == recipe.name)
    return load(path, overrides)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_takes_three_steps(path, pictures, tmp_path):
    recipe = load(path)
    batch = 4 if recipe.data.image_size <= 64 else 2
    small = [
        f"training.global_batch_size={batch}",
        "training.precision=fp32",
        f"runs={tmp_path}",
        "evaluation.batch_size=2",
    ]
    recipe = load(path, [*small, *pictures(recipe), *AFFORDABLE.get(recipe.model.name, [])])
    with process_group() as world:
        run = StartedRun(recipe, world)
        before = [parameter.detach().clone() for parameter in run.engine.module.parameters()]
        assert all(torch.isfinite(loss) for loss in run.update(STEPS))
        moved = [
            not torch.equal(old, new)
            for old, new in zip(before, run.engine.module.parameters(), strict=True)
        ]
    assert all(moved), f"{moved.count(False)} of {len(moved)} parameters stood still"
