"""The penalty on the dynamic weights, against weights that are formed layer by layer."""

import pytest
import timm
import torch
from recipes_for_tests import small_recipe
from torch import nn
from torch.nn.functional import fold, unfold

from pipeline.distributed import process_group
from pipeline.errors import UserError
from pipeline.export import load_export
from pipeline.interpret.contributions import layer_contributions
from pipeline.models.dau import DAUConv2d
from pipeline.training.penalty import CLASSES, DynamicWeightPenalty


class Chain(nn.Module):
    """A convolution and two DAU layers."""

    temperature = 7.0

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3)
        self.first = DAUConv2d(4, 5, 3, padding=1, stride=2, rank=3, norm=norm)
        self.last = DAUConv2d(5, 6, 1, rank=9, norm=norm)
        self.double()

    def forward(self, x):
        return self.last(self.first(self.stem(x).relu())).sum((2, 3)) / self.temperature


def rescaled_weights(layer, x):
    """Every dynamic weight after its rescaling, differentiable, and the patches.

    The weights are (B, O, d, L), with d in the order channel, row, column.
    """
    patches = unfold(x, layer.kernel_size, stride=layer.stride, padding=layer.padding)
    z = layer.down(x).flatten(2)
    k = layer.kernel_size**2
    # The order row, column, channel becomes channel, row, column.
    a = layer.up_weight.unflatten(1, (k, -1)).transpose(1, 2).flatten(1, 2)
    w = torch.einsum("odr,brl->bodl", a, z)
    if layer.up_bias is not None:
        w = w + layer.up_bias.unflatten(1, (k, -1)).transpose(1, 2).flatten(1)[None, :, :, None]
    size = w.norm(dim=2, keepdim=True)
    if layer.norm == "wb":
        size = (
            layer.up_weight.square().sum((1, 2))[None, :, None] * z.square().sum(1, keepdim=True)
        ).sqrt()[:, :, None]
    return w * size / (1 + size**2) if layer.norm == "sq" else w / size, patches


def slow(model, x, classes):
    """Mean |W| over the listed classes (K, B), from the network's definition."""
    features = model.stem(x).relu()
    w1, patches = rescaled_weights(model.first, features)
    hidden = (w1 * patches[:, None]).sum(2).unflatten(2, (3, 3))
    w2, _ = rescaled_weights(model.last, hidden)  # (B, 6, 5, L), as its kernel is 1
    total = 0
    for chosen in classes:
        of_hidden = w2[torch.arange(len(x)), chosen]  # (B, 5, L)
        of_patches = (of_hidden[:, :, None] * w1).sum(1)  # (B, d, L)
        total = total + fold(of_patches, features.shape[2:], 3, stride=2, padding=1).abs().mean()
    return total / len(classes)


@pytest.mark.parametrize("norm", ["sq", "l2", "wb"])
def test_value_and_gradients_are_those_of_the_formed_weights(norm):
    model, labels = Chain(norm), torch.tensor([0, 3])
    x = torch.rand(2, 3, 7, 7, dtype=torch.float64)
    penalty = DynamicWeightPenalty(model, 0.5, seed=1)
    logits = model(x)
    value = penalty(labels, update=3)
    expected = 0.5 * slow(model, x, penalty.classes(labels, 6, update=3).t())
    torch.testing.assert_close(value, expected)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(value + logits.square().sum(), parameters)
    theirs = torch.autograd.grad(expected + model(x).square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_classes_are_the_label_and_others_that_change_with_the_update():
    penalty, labels = DynamicWeightPenalty(Chain("sq"), 1.0, seed=1), torch.tensor([0, 3, 9])
    drawn = [penalty.classes(labels, 10, update) for update in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0][:, 0], labels)
    assert all(
        len(set(row)) == CLASSES and 0 <= min(row) <= max(row) < 10 for row in drawn[0].tolist()
    )
    assert penalty.classes(labels % 2, 2, 0).sort(1)[0].tolist() == [[0, 1]] * 3


def mean_weight(recipe):
    """Mean |W| of the exported network, over all classes of random images."""
    model = load_export(recipe.folder.path / "export")
    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(10).expand(16, -1)
    encoded = model.encode(x)[:, None]
    return float(
        (layer_contributions(model, x, classes, [None])[None] / encoded.clamp_min(1e-6))
        .abs()
        .mean()
    )


def test_training_with_the_penalty_makes_the_weights_smaller(prepared, tmp_path):
    # This imports DeepSpeed.
    from pipeline.training.run import train

    changes = [
        dict(runs=str(tmp_path / str(strength)), training__weight_penalty=strength)
        for strength in (0.0, 30.0)
    ]
    recipes = [small_recipe(prepared, training__epochs=1, **each) for each in changes]
    with process_group() as world:
        for recipe in recipes:
            train(recipe, world)
    without, penalised = map(mean_weight, recipes)
    assert penalised < 0.7 * without


def test_a_model_without_dynamic_weights_is_refused():
    with pytest.raises(UserError, match="weight_penalty needs a model with DAU layers"):
        DynamicWeightPenalty(timm.create_model("resnet20"), 1.0, seed=0)
