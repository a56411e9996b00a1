"""Contributions against known answers and a slow twin, completeness, and explanation mode."""

import copy

import pytest
import timm
import torch
from planted_models import Chain, Distracted, PlantedCoDA, PlantedLinear, flags, rand
from torch import Tensor, nn
from torch.nn import functional

import pipeline  # noqa: F401  registers the CoDA models
from pipeline.errors import UserError
from pipeline.interpret.contributions import (
    completeness_error,
    contributions,
    explainable_layers,
    explanation_mode,
    layer_contributions,
)


def slow_contributions(model: nn.Module, images: Tensor, target: int, at: str) -> Tensor:
    """Follow the definition, one layer and class at a time.

    The network is cut after the layer, and the rest is differentiated by the cut.
    """
    cut: list[Tensor] = []

    def replace(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        cut.append(output.detach().clone().requires_grad_())
        return cut[0] * 1

    with explanation_mode(model):
        handle = model.get_submodule(at).register_forward_hook(replace)
        logits = model(images)
        handle.remove()
    (
        getattr(model, "temperature", 1.0) * (logits[:, target] - getattr(model, "logit_bias", 0.0))
    ).sum().backward(inputs=cut)
    return (cut[0] * cut[0].grad).detach()


def test_linear_model_has_contributions_known_by_hand():
    weight, images = rand(4, 3, 2, 2) - 0.5, rand(2, 3, 2, 2, seed=1)
    found = contributions(PlantedLinear(weight), images, torch.tensor([3, 1]))
    assert torch.equal(found, images * weight[[3, 1]])
    assert not found.requires_grad
    # Contributions are signed.
    assert (found < 0).any()


def test_temperature_and_bias_are_taken_out():
    images, targets = rand(2, 3, 4, 4), torch.tensor([2, 0])
    model = PlantedCoDA().double()
    total = contributions(model, images, targets).sum((1, 2, 3))
    expected = 7.0 * (model(images)[[0, 1], targets] + 2.2)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    assert expected.abs().min() > 1e-3


@pytest.mark.parametrize("at", [None, "stage1", "stage1.0", "pool", "stage2.0", "head"])
def test_dynamic_linear_net_is_complete_everywhere(at):
    error = completeness_error(
        PlantedCoDA().double(), rand(3, 3, 6, 6), torch.tensor([0, 1, 2]), at
    )
    assert error.shape == (3,)
    assert error.max() < 1e-12


def test_completeness_needs_the_fixed_weights():
    """Not a metric that is always 0: with the dynamic weights differentiated it is far from it."""
    model = PlantedCoDA().double()
    for module in (model.stage1[0], model.stage1[1], model.stage2[0], model.head):
        # It does not opt in.
        module.explaining = None
    assert completeness_error(model, rand(3, 3, 6, 6), torch.tensor([0, 1, 2])).min() > 1e-3


def test_completeness_of_nothing():
    images, targets = rand(2, 3, 2, 2), torch.tensor([0, 1])
    assert torch.equal(
        completeness_error(PlantedLinear(torch.zeros(2, 3, 2, 2).double()), images, targets),
        torch.zeros(2).double(),
    )
    silent = PlantedLinear(torch.zeros(2, 3, 2, 2).double())
    silent.logit_bias = -1.0
    assert completeness_error(silent, images, targets).isinf().all()


@pytest.mark.parametrize("conventional", [False, True])
def test_many_layers_and_classes_at_once_equal_the_slow_twin(conventional):
    model = PlantedCoDA(conventional=conventional).double()
    images, targets = rand(2, 3, 6, 6), torch.tensor([[0, 1, 2], [0, 1, 2]])
    layers = ["stem", "stage1.0", "pool", "stage2.0", "head", None]
    found = layer_contributions(model, images, targets, layers)
    maps = layer_contributions(model, images, targets, layers, sum_channels=True)
    assert list(found) == layers
    for layer in layers:
        assert torch.equal(maps[layer], found[layer].sum(2))
        for k in range(3):
            assert torch.equal(
                found[layer][:, k], contributions(model, images, targets[:, k], layer)
            )
            if layer is not None:
                torch.testing.assert_close(
                    found[layer][:, k],
                    slow_contributions(model, images, k, layer),
                    rtol=1e-10,
                    atol=1e-12,
                )


def test_in_place_operations_do_not_change_what_is_captured():
    images, targets, layers = (
        rand(2, 3, 6, 6),
        torch.tensor([[0, 3], [1, 2]]),
        ["conv1", "act1", "conv2", "act2", None],
    )
    found = layer_contributions(Chain(inplace=True), images, targets, layers)
    expected = layer_contributions(Chain(inplace=False), images, targets, layers)
    for layer in layers:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        found["act2"][0, 1],
        slow_contributions(Chain(inplace=False), images, 3, "act2")[0],
        rtol=1e-12,
        atol=0,
    )
    # A ReLU passes on exactly 0 or the value that reaches it.
    assert (found["conv1"] - found["act1"]).abs().max() < 1e-12


def test_network_that_begins_in_place():
    weight, images = rand(2, 3, 2, 2), rand(1, 3, 2, 2) - 0.5
    before = images.clone()
    found = contributions(
        nn.Sequential(nn.ReLU(inplace=True), PlantedLinear(weight)), images, torch.tensor([1])
    )
    assert torch.equal(found, images.clamp(min=0) * weight[1])
    assert torch.equal(images, before)


def test_layer_that_the_logits_do_not_depend_on_contributes_nothing():
    found = contributions(Distracted(rand(2, 3, 4, 4)), rand(1, 3, 4, 4), torch.tensor([0]), "idle")
    assert torch.equal(found, torch.zeros(1, 3, 2, 2).double())


def test_images_do_not_interact_and_are_not_changed():
    model, images, targets = (
        timm.create_model("resnet18", num_classes=5).double(),
        rand(3, 3, 32, 32),
        torch.tensor([0, 1, 2]),
    )
    before = images.clone()
    together = contributions(model, images, targets, "layer2")
    assert torch.equal(images, before)
    torch.testing.assert_close(
        together[1:2],
        contributions(model, images[1:2], targets[1:2], "layer2"),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_inside_an_evaluation_without_gradients(context):
    for model in (PlantedCoDA().double(), PlantedLinear(rand(2, 3, 4, 4))):
        expected = contributions(model, rand(2, 3, 4, 4), torch.tensor([0, 1]))
        with context():
            assert torch.equal(
                contributions(model, rand(2, 3, 4, 4), torch.tensor([0, 1])), expected
            )


@pytest.mark.parametrize(
    ("at", "target", "error"), [("nothing", 0, UserError), ("head", 9, RuntimeError)]
)
def test_failed_explanations_leave_no_trace(at, target, error):
    model = PlantedCoDA().train()
    found = flags(model)
    with pytest.raises(error):
        contributions(model, rand(1, 3, 4, 4).float(), torch.tensor([target]), at)
    assert flags(model) == found
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["coda_resnet20", "coda_s", "resnet20", "resnet18"])
def test_training_step_after_explaining_is_bit_equal(name):
    torch.manual_seed(0)
    fresh = timm.create_model(name, num_classes=4).train()
    explained = copy.deepcopy(fresh)
    images, targets = rand(2, 3, 32, 32).float(), torch.tensor([1, 3])
    layer_contributions(
        explained,
        images,
        targets[:, None],
        [layer.name for layer in explainable_layers(explained, images)],
    )
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in explained.parameters()
    )
    for model in (fresh, explained):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        functional.binary_cross_entropy_with_logits(
            model(images), functional.one_hot(targets, 4).float()
        ).backward()
        optimizer.step()
    for (key, ours), theirs in zip(
        explained.state_dict().items(), fresh.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), key


def test_gradients_in_progress_are_left_alone():
    model, images = PlantedCoDA(conventional=True), rand(2, 3, 4, 4).float()
    model(images).sum().backward()
    model.stem[0].weight.requires_grad_(False)
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    contributions(model, images, torch.tensor([0, 1]), "stage1")
    assert not model.stem[0].weight.requires_grad
    assert all(
        torch.equal(p.grad, b)
        for p, b in zip(model.parameters(), before, strict=True)
        if b is not None
    )


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("conv3", r"no module 'conv3'; nearest names: .*conv2"),
        ("zzz", r"no module 'zzz'; nearest names: conv1"),
        ("fc", r"output of module 'fc' is \(1, 5\)"),
        ("unused", r"module 'unused' does not run"),
        ("act1", r"module 'act1' runs more than once"),
    ],
)
def test_impossible_layers_are_the_users_mistake(at, message):
    model = Chain(inplace=False)
    model.unused = nn.Identity()
    model.act2 = model.act1
    with pytest.raises(UserError, match=message) as caught:
        contributions(model, rand(1, 3, 6, 6), torch.tensor([0]), at)
    assert "\n" not in str(caught.value)


def test_wrong_shape_of_targets():
    with pytest.raises(ValueError, match=r"\(B, K\)"):
        layer_contributions(PlantedCoDA().double(), rand(2, 3, 4, 4), torch.tensor([0, 1]), [None])


@pytest.mark.parametrize("norm", ["sq", "l2", "wb"])
def test_registered_coda_net_is_complete_at_every_layer(norm):
    """It is so with b0 = 0.

    Otherwise an untrained network's outputs (wb: 5e-5) drown in the rounding error of a logit near
    b0.
    """
    model = timm.create_model(
        "coda_s", norm=norm, rank=4, temperature=10.0, logit_bias=0.0
    ).double()
    images, targets = rand(1, 3, 16, 16), torch.tensor([4])
    for layer in explainable_layers(model, images):
        assert completeness_error(model, images, targets, layer.name).item() < 1e-14, layer


def test_hybrid_is_complete_from_the_junction_on():
    """The biases of its trunk are made non-trivial: the CoDA part is exact, the trunk is not."""
    model = timm.create_model("coda_resnet20").double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.5, 0.5)
    images, targets = rand(2, 3, 32, 32), torch.tensor([4, 0])
    for layer in ("head.classifier", "stage3.2", "stage3.1", "stage3.0", "stage2.2"):
        assert completeness_error(model, images, targets, layer).max() < 1e-12, layer
    assert completeness_error(model, images, targets, "stage1.0").min() > 1e-6
