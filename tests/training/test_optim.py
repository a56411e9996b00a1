"""Learning rates by a table; weight decay only where it belongs; losses by hand."""

import dataclasses
import math

import pytest
import timm
import torch
from recipes_for_tests import small_recipe

from pipeline.errors import UserError
from pipeline.planning.gpus import GPUS
from pipeline.planning.plan import Cluster, Plan
from pipeline.recipe.optimisers import OPTIMISERS, Optimiser
from pipeline.recipe.schedules import SCHEDULES, learning_rate
from pipeline.recipe.schema import TrainingRecipe
from pipeline.training.losses import LOSSES, soft_targets
from pipeline.training.optim import build_optimizer

TRAINING = TrainingRecipe(
    epochs=10, global_batch_size=8, learning_rate=1.0, warmup_epochs=2, weight_decay=0.1
)


@pytest.mark.parametrize(
    ("update", "rate"),
    [
        (0, 1 / 8),
        (3, 0.5),
        (7, 1.0),
        (8, 1.0),
        (24, 0.5),
        (39, 0.5 * (1 + math.cos(math.pi * 31 / 32))),
    ],
)
def test_warmup_then_cosine(update, rate):
    assert learning_rate(update, 4, TRAINING) == pytest.approx(rate)


def test_no_warmup_starts_at_the_full_rate():
    assert learning_rate(0, 4, dataclasses.replace(TRAINING, warmup_epochs=0)) == 1.0


@pytest.mark.parametrize(("update", "rate"), [(3, 0.5), (8, 1.0), (24, 0.5), (39, 1 / 32)])
def test_warmup_then_a_straight_line(update, rate):
    assert learning_rate(
        update, 4, dataclasses.replace(TRAINING, schedule="linear")
    ) == pytest.approx(rate)


PUBLISHED_S = dataclasses.replace(
    TRAINING,
    epochs=200,
    learning_rate=2.5e-4,
    warmup_epochs=0,
    schedule="step",
    step_epochs=30,
    step_factor=1.5,
)
PUBLISHED_L = dataclasses.replace(
    TRAINING,
    epochs=60,
    learning_rate=1e-3,
    warmup_epochs=15,
    warmup_learning_rate=2.5e-4,
    schedule="step",
    step_epochs=20,
    step_factor=2,
)


@pytest.mark.parametrize(
    ("training", "epoch", "rate"),
    [
        (PUBLISHED_S, 0, 2.5e-4),
        (PUBLISHED_S, 29, 2.5e-4),
        (PUBLISHED_S, 30, 2.5e-4 / 1.5),
        (PUBLISHED_S, 199, 2.5e-4 / 1.5**6),
        (PUBLISHED_L, 0, 2.5e-4 + 7.5e-4 / 60),
        (PUBLISHED_L, 15, 1e-3),
        (PUBLISHED_L, 19, 1e-3),
        (PUBLISHED_L, 20, 5e-4),
        (PUBLISHED_L, 59, 2.5e-4),
    ],
)
def test_steps_of_the_published_configurations(training, epoch, rate):
    assert learning_rate(4 * epoch, 4, training) == pytest.approx(rate)


def test_a_new_schedule_is_one_entry(tmp_path, monkeypatch):
    def constant(progress, epoch, training):
        return training.learning_rate

    with pytest.raises(UserError, match=r"'constant'; valid: cosine, linear, step$"):
        small_recipe(tmp_path, training__schedule="constant")
    monkeypatch.setitem(SCHEDULES, "constant", constant)
    training = small_recipe(tmp_path, training__schedule="constant").training
    assert {learning_rate(update, 4, training) for update in range(8)} == {training.learning_rate}


@pytest.mark.parametrize("optimizer", OPTIMISERS)
@pytest.mark.parametrize("model", ["coda_resnet20", "coda_s", "coda_resnet18", "resnet20"])
def test_weight_decay_spares_biases_and_normalisation(optimizer, model):
    model = timm.create_model(model)
    built = build_optimizer(model, dataclasses.replace(TRAINING, optimizer=optimizer))
    decayed = {
        id(p) for group in built.param_groups if group["weight_decay"] for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name.endswith(("bias", "up_bias"))
        assert (id(parameter) in decayed) != spared, name


def test_binary_cross_entropy_is_a_sum_over_classes_and_a_mean_over_images():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    # Of the labels 1 and 0.
    expected = ((math.log(2) + math.log(4 / 3)) + 2 * math.log(2)) / 2
    targets = soft_targets(torch.tensor([1, 0]), 2)
    assert LOSSES["bce"](logits, targets).item() == pytest.approx(expected)
    assert LOSSES["cross_entropy"](logits, targets).item() == pytest.approx(
        (math.log(4 / 3) + math.log(2)) / 2
    )


def test_smoothed_targets_spread_their_share_over_all_classes():
    targets = soft_targets(torch.tensor([2, 0]), 4, smoothing=0.2)
    assert targets.sum(1).tolist() == pytest.approx([1, 1])
    assert targets[0].tolist() == pytest.approx([0.05, 0.05, 0.85, 0.05])


def test_sgd_has_nesterovs_momentum():
    built = build_optimizer(
        timm.create_model("resnet20"), dataclasses.replace(TRAINING, optimizer="sgd", momentum=0.8)
    )
    assert all(group["nesterov"] and group["momentum"] == 0.8 for group in built.param_groups)


def test_muon_orthogonalises_what_a_matrix_learns_and_steps_as_far_as_adamw():
    layer, momentum = torch.nn.Linear(24, 8), 0.8
    training = dataclasses.replace(
        TRAINING, optimizer="muon", learning_rate=1e-3, weight_decay=0.0, momentum=momentum
    )
    optimizer = build_optimizer(layer, training)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    gradient = torch.randn(8, 24, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.linspace(0.01, 10, 24)
    )
    layer.weight.grad, layer.bias.grad = gradient, torch.linspace(-1, 1, 8)
    optimizer.step()
    weight, bias = (
        (parameter - old).detach()
        for parameter, old in zip(layer.parameters(), before, strict=True)
    )
    spread = torch.linalg.svdvals(weight)
    assert (
        spread.max() / spread.min()
        < 2
        < torch.linalg.svdvals(gradient).max() / torch.linalg.svdvals(gradient).min()
    )
    # AdamW's updates have 0.2 to 0.4 of the rate.
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2 * 1e-3, rel=0.2)
    torch.testing.assert_close(bias, -1e-3 * layer.bias.grad.sign(), rtol=1e-3, atol=0)
    assert all(group["momentum"] == momentum for group in optimizer.param_groups)


def test_a_new_optimiser_is_one_entry(tmp_path, monkeypatch):
    changes = {"training__optimizer": "nadamw", "training__zero_stage": 1}
    with pytest.raises(UserError, match=r"'nadamw'; valid: adam, adamw, sgd, muon$"):
        small_recipe(tmp_path, **changes)
    entry = Optimiser("nadamw", state_numbers=2, update_passes=24)
    monkeypatch.setitem(OPTIMISERS, "nadamw", entry)
    recipe = small_recipe(tmp_path, **changes)

    plan = Plan(recipe)
    assert plan.state_bytes(1)["optimiser"] == 2 * plan.state_bytes(1)["weights"]
    assert plan.step(8, Cluster(1, 1, GPUS["h100"]), 128, 128).seconds > 0

    layer = torch.nn.Linear(4, 3)
    optimizer = build_optimizer(layer, recipe.training)
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert type(optimizer).__name__ == "NAdamW"
    assert not torch.equal(layer.weight, before)
    assert len(optimizer.state[layer.weight]) == 1 + entry.state_numbers
