"""Learning rates by a table; weight decay only where it belongs; losses by hand."""

import dataclasses
import math

import pytest
import timm
import torch

from pipeline.recipe import TrainingRecipe
from pipeline.training.losses import LOSSES
from pipeline.training.optim import build_optimizer, learning_rate

TRAINING = TrainingRecipe(epochs=10, global_batch_size=8, learning_rate=1.0, warmup_epochs=2, weight_decay=0.1)


@pytest.mark.parametrize(
    ("update", "rate"), [(0, 1 / 8), (3, 0.5), (7, 1.0), (8, 1.0), (24, 0.5), (39, 0.5 * (1 + math.cos(math.pi * 31 / 32)))]
)
def test_warmup_then_cosine(update, rate):
    assert learning_rate(update, 4, TRAINING) == pytest.approx(rate)


def test_no_warmup_starts_at_the_full_rate():
    assert learning_rate(0, 4, dataclasses.replace(TRAINING, warmup_epochs=0)) == 1.0


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("model", ["coda_resnet20", "resnet20"])
def test_weight_decay_spares_biases_and_normalisation(optimizer, model):
    model = timm.create_model(model)
    built = build_optimizer(model, dataclasses.replace(TRAINING, optimizer=optimizer))
    decayed = {id(p) for group in built.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name.endswith(("bias", "up_bias"))
        assert (id(parameter) in decayed) != spared, name


def test_binary_cross_entropy_is_a_sum_over_classes_and_a_mean_over_images():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    expected = ((math.log(2) + math.log(4 / 3)) + 2 * math.log(2)) / 2  # labels 1 and 0
    assert LOSSES["bce"](logits, torch.tensor([1, 0])).item() == pytest.approx(expected)
    assert LOSSES["cross_entropy"](logits, torch.tensor([1, 0])).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
