"""Evaluation on real .beton files: the same numbers for any number of processes, and those a plain loop gives."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from recipes_for_tests import small_recipe
from torch import nn

from pipeline.data.load import eval_loader, unit_range
from pipeline.distributed import World, process_group
from pipeline.evaluate import METRICS, evaluate
from pipeline.training.model import build_model

EVERYTHING = tuple(METRICS)
CHANGES = dict(evaluation__grid_size=2, evaluation__grids=5, evaluation__batch_size=50, evaluation__completeness_images=21)


class Oracle(nn.Module):
    """Knows the label of every validation image by its pixels; logit +5 for it and -5 for the others."""

    def __init__(self, loader):
        super().__init__()
        self.layer = nn.Conv2d(3, 10, 1)
        with loader.epoch(0) as batches:
            pairs = [(image, label) for batch in batches for image, label in zip(batch.images, batch.labels, strict=True)]
        self.label = {image.numpy().tobytes(): int(label) for image, label in pairs}

    def forward(self, images):
        wanted = torch.tensor([self.label[(image * 255).round().byte().numpy().tobytes()] for image in images])
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
        pairs = [(model.eval()(unit_range(batch.images, torch.device("cpu"))), batch.labels) for batch in batches]
    logits, labels = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    assert len(labels) == loader.samples
    assert values["val/top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert values["val/top5"] == pytest.approx((rank < 5).float().mean().item())


def test_an_oracle_is_always_right(prepared):
    recipe = small_recipe(prepared)
    loader = eval_loader(recipe, World(), 64)
    assert evaluate(Oracle(loader), recipe, loader, World(), ("accuracy",)).values["val/top1"] == 1.0


def test_evaluation_leaves_the_model_in_the_mode_it_found(prepared):
    recipe = small_recipe(prepared, **CHANGES)
    model = untrained(recipe)
    for training in (True, False):
        model.train(training)
        evaluate(model, recipe, eval_loader(recipe, World(), 50), World(), EVERYTHING)
        assert all(module.training == training for module in model.modules())


def _member(rank, size, port, folder, changes, results):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    recipe = small_recipe(folder, **changes)
    with process_group(timeout_seconds=120) as world:
        result = evaluate(untrained(recipe), recipe, eval_loader(recipe, world, 50), world, EVERYTHING)
        results.put((rank, result.values, [(p.layer, p.distance, p.localisation) for p in result.curve]))


@pytest.mark.parametrize("model", ["coda_s", "resnet20"])
def test_any_number_of_processes_gives_the_same_result(prepared, model):
    args = {"rank": 2, "temperature": 1.0, "logit_bias": 1.0} if model == "coda_s" else {}
    changes = dict(CHANGES, model__name=model, model__args=args)
    recipe = small_recipe(prepared, **changes)
    alone = evaluate(untrained(recipe), recipe, eval_loader(recipe, World(), 50), World(), EVERYTHING)
    assert alone.values["val/top1"] < 1 and set(alone.values) >= {"val/top1", "interp/completeness_error", "interp/grids"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.start_processes(_member, args=(3, port, prepared, changes, results), nprocs=3, start_method="spawn")
    for _, values, curve in (results.get() for _ in range(3)):
        assert values == pytest.approx(alone.values, rel=1e-4, abs=1e-6)
        assert [point[0] for point in curve] == [point.layer for point in alone.curve]
        assert [point[2] for point in curve] == pytest.approx([point.localisation for point in alone.curve], rel=1e-3)
