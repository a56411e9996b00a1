"""Evaluation on real .beton files: the numbers of a plain loop, for any number of processes."""

from multiprocessing import get_context
from typing import get_args

import pytest
import torch
from processes import run_on, stand_as
from recipes_for_tests import small_recipe
from runs_for_tests import eval_loader
from torch import nn

from pipeline.data.epoch_loader import unit_range
from pipeline.distributed import World, process_group
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.metrics import METRICS, tracked_names
from pipeline.interpret.methods import METHODS
from pipeline.models.create import build_model
from pipeline.recipe.schema import MethodName, MetricName

EVERYTHING = tuple(METRICS)
CHANGES = dict(
    evaluation__grid_size=2,
    evaluation__grids=5,
    evaluation__batch_size=50,
    evaluation__completeness_images=21,
)
CHANGES |= dict(evaluation__removal_images=7, evaluation__alignment_images=20)


class Oracle(nn.Module):
    """A model that knows every validation image by its pixels.

    The logit of its label is +5, that of the other classes -5.
    """

    def __init__(self, loader):
        super().__init__()
        self.layer = nn.Conv2d(3, 10, 1)
        with loader.epoch(0) as batches:
            pairs = [
                (image, label)
                for batch in batches
                for image, label in zip(batch.images, batch.labels, strict=True)
            ]
        self.label = {image.numpy().tobytes(): int(label) for image, label in pairs}

    def forward(self, images):
        wanted = torch.tensor(
            [self.label[(image * 255).round().byte().numpy().tobytes()] for image in images]
        )
        return 10 * nn.functional.one_hot(wanted, 10).float() - 5


def untrained(recipe):
    """A model with random weights, the same in every process."""
    torch.manual_seed(1)
    return build_model(recipe.model, 10)


def test_accuracy_is_what_a_plain_loop_counts(prepared):
    recipe = small_recipe(prepared, **CHANGES)
    loader, model = eval_loader(recipe, World(), 50), untrained(recipe)
    values = evaluate(model, recipe, loader, World(), ("accuracy",)).values
    with loader.epoch(0) as batches, torch.no_grad():
        pairs = [
            (model.eval()(unit_range(batch.images, torch.device("cpu"))), batch.labels)
            for batch in batches
        ]
    logits, labels = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    assert len(labels) == loader.samples
    assert values["val/top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert values["val/top5"] == pytest.approx((rank < 5).float().mean().item())


def test_an_oracle_is_always_right(prepared):
    recipe = small_recipe(prepared)
    loader = eval_loader(recipe, World(), 64)
    assert (
        evaluate(Oracle(loader), recipe, loader, World(), ("accuracy",)).values["val/top1"] == 1.0
    )


def test_evaluation_leaves_the_model_in_the_mode_it_found(prepared):
    recipe = small_recipe(prepared, **CHANGES)
    model = untrained(recipe)
    for training in (True, False):
        model.train(training)
        evaluate(model, recipe, eval_loader(recipe, World(), 50), World(), EVERYTHING)
        assert all(module.training == training for module in model.modules())


def _member(rank, size, port, folder, each, results):
    stand_as(rank, size, port)
    with process_group(timeout_seconds=120) as world:
        for changes in each:
            recipe = small_recipe(folder, **changes)
            result = evaluate(
                untrained(recipe), recipe, eval_loader(recipe, world, 50), world, EVERYTHING
            )
            results.put((changes["model__name"], result.values, result.tables))


def test_any_number_of_processes_gives_the_same_result(prepared):
    models = {"coda_s": {"rank": 2, "temperature": 1.0, "logit_bias": 1.0}, "resnet20": {}}
    each = [dict(CHANGES, model__name=name, model__args=args) for name, args in models.items()]
    alone = {}
    for changes in each:
        recipe = small_recipe(prepared, **changes)
        result = evaluate(
            untrained(recipe), recipe, eval_loader(recipe, World(), 50), World(), EVERYTHING
        )
        alone[changes["model__name"]] = result
        assert result.values["val/top1"] < 1
        assert set(result.values) >= {
            "interp/completeness_error",
            "interp/grids",
        }
    # The input comes once, though it is also the junction.
    assert [row["layer"] for row in alone["coda_s"].tables["localisation"]] == ["input"]
    results = get_context("forkserver").SimpleQueue()
    run_on(3, _member, prepared, each, results)
    for name, values, tables in (results.get() for _ in range(6)):
        assert values == pytest.approx(alone[name].values, rel=1e-4, abs=1e-6)
        assert set(tables) == set(alone[name].tables)
        for metric, rows in tables.items():
            for row, expected in zip(rows, alone[name].tables[metric], strict=True):
                assert row == {
                    key: pytest.approx(v, rel=1e-3, abs=1e-6) if isinstance(v, float) else v
                    for key, v in expected.items()
                }


def test_names_of_recipe_and_tracking_are_those_of_the_tables(prepared):
    assert set(get_args(MetricName)) == set(METRICS)
    assert set(get_args(MethodName)) == set(METHODS)
    recipe = small_recipe(
        prepared, **CHANGES, model__args={"rank": 2, "temperature": 1.0, "logit_bias": 1.0}
    )
    loader = eval_loader(recipe, World(), 50)
    result = evaluate(
        untrained(recipe),
        recipe,
        loader,
        World(),
        EVERYTHING,
        ("contributions", "gradcam", "input_x_gradient"),
    )
    assert set(result.values) <= set(tracked_names())
    of_gradcam = {name for name in result.values if name.startswith("interp/gradcam/")}
    assert {
        "interp/gradcam/localisation_median",
        "interp/gradcam/pixel_removal_least",
        "interp/gradcam/area",
    } <= of_gradcam
    by_method = {row["method"]: row["layer"] for row in result.tables["localisation_2x2"]}
    assert by_method == {
        "contributions": "input",
        "gradcam": "head.classifier",
        "input_x_gradient": "input",
    }
    depths = {
        m: [r["layer"] for r in result.tables["depth"] if r["method"] == m] for m in by_method
    }
    assert depths["contributions"] == depths["input_x_gradient"] == [*depths["gradcam"], "input"]


class Corner(Oracle):
    """A model that looks at the first pixel only.

    The logit of class 0 is +4 while this pixel is there and -4 once it is removed; the logits of
    the other classes are -9.
    """

    def forward(self, images):
        own = torch.where(images[:, :, 0, 0].amax(1) >= 0, 4.0, -4.0) + 0 * images.sum((1, 2, 3))
        return (
            nn.functional.one_hot(torch.zeros(len(images), dtype=torch.int64), 10)
            * (own[:, None] + 9)
            - 9.0
        )

    def encode(self, images):
        # Only removal makes a pixel 0.
        return 1 + images

    def forward_encoded(self, encoded):
        return self.forward(encoded - 1)


def test_pixel_removal_of_a_model_that_looks_at_one_pixel(prepared):
    """Its maps are zero, so that pixels go in row-major order, and the one that counts first."""
    recipe = small_recipe(prepared, **CHANGES)
    loader = eval_loader(recipe, World(), 50)
    rows = evaluate(Corner(loader), recipe, loader, World(), ("pixel_removal",)).tables[
        "pixel_removal"
    ]
    zeros = [label for label in (loader_labels(loader)[:7]) if label == 0]
    for first in ("least", "most"):
        curve = [row["probability"] for row in rows if row["first"] == first]
        assert [row["removed"] for row in rows if row["first"] == first] == [
            k / 64 for k in range(17)
        ]
        rest = torch.tensor(-9.0).sigmoid().item()
        before, after = (torch.tensor(logit).sigmoid().item() for logit in (4.0, -4.0))
        share = len(zeros) / 7
        assert curve[0] == pytest.approx(share * before + (1 - share) * rest, rel=1e-5)
        assert curve[1:] == pytest.approx([share * after + (1 - share) * rest] * 16, rel=1e-4)


def loader_labels(loader):
    with loader.epoch(0) as batches:
        return torch.cat([batch.labels for batch in batches]).tolist()
