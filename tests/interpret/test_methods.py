"""Post-hoc methods against known answers and slow twins; where they apply; no trace is left."""

import pytest
import timm
import torch
from planted_models import PlantedCoDA, PlantedLinear, flags, rand
from torch import nn
from torch.nn import functional

import pipeline  # noqa: F401  registers the CoDA models
from pipeline.errors import UserError
from pipeline.interpret.contributions import explainable_layers, layer_contributions
from pipeline.interpret.lime import LIME_IMAGES
from pipeline.interpret.methods import (
    BY_LAYER,
    METHODS,
    at_input_size,
    attribution_maps,
    check_method,
    own_place,
    places,
)

TARGETS = torch.tensor([[0, 2], [1, 0]])
LINEAR = ["contributions", "input_x_gradient", "integrated_gradients"]


def rectified(weight):
    """Build logits = <weight, relu(images)> of weight (classes, 3, 2, 2)."""
    linear = nn.Linear(12, len(weight), bias=False).double()
    linear.weight.data = weight.flatten(1)
    return nn.Sequential(nn.ReLU(), nn.Flatten(), linear)


@pytest.mark.parametrize("method", [*LINEAR, "gradient"])
def test_linear_model_is_known_by_hand(method):
    weight, images = rand(3, 3, 4, 4) - 0.5, rand(2, 3, 4, 4, seed=1)
    found = attribution_maps(method, PlantedLinear(weight), images, TARGETS, [None])[None]
    terms = weight[TARGETS] if method == "gradient" else weight[TARGETS] * images[:, None]
    torch.testing.assert_close(found, terms.sum(2), rtol=1e-6, atol=1e-9)
    assert (found < 0).any()
    assert not found.requires_grad


@pytest.mark.parametrize("window", [5, 9])
def test_occlusion_equals_its_definition(window):
    """It is what the logit loses when a window is blanked, averaged over the windows of a pixel."""
    model, images = PlantedCoDA().double(), rand(2, 3, 11, 11)
    encoded = model.encode(images)
    total, times = torch.zeros(2, 2, 11, 11).double(), torch.zeros(11, 11)
    steps = range(0, 11 - window + 1, 2)
    for top in steps:
        for left in steps:
            blanked = encoded.clone()
            blanked[:, :, top : top + window, left : left + window] = 0
            lost = (model.forward_encoded(encoded) - model.forward_encoded(blanked)).gather(
                1, TARGETS
            )
            total[:, :, top : top + window, left : left + window] += lost[..., None, None].detach()
            times[top : top + window, left : left + window] += 1
    found = attribution_maps(f"occlusion_{window}", model, images, TARGETS, [None])[None]
    # The map is summed over 6 equal channels.
    torch.testing.assert_close(found.double(), 6 * total / times, rtol=1e-5, atol=1e-7)


def test_lime_finds_the_part_of_each_superpixel():
    """The parts of a linear model are known; the ridge shrinks them a little.

    Another class costs no forward pass.
    """
    corners = torch.tensor([[0.9, 0.1], [0.3, 0.6]]).double()
    images = corners.repeat_interleave(8, 0).repeat_interleave(8, 1).expand(2, 3, 16, 16)
    weight, passes = rand(3, 3, 16, 16) - 0.4, []
    model = PlantedLinear(weight)
    with model.register_forward_hook(lambda module, inputs, output: passes.append(len(output))):
        # Every channel shows the part of its superpixel.
        found = attribution_maps("lime", model, images, TARGETS, [None])[None].double() / 3
    parts = (weight[TARGETS] * images[:, None]).sum(2)  # (B, K, 16, 16)
    for top in (0, 8):
        for left in (0, 8):
            corner = found[:, :, top : top + 8, left : left + 8]
            assert torch.equal(corner, corner[..., :1, :1].expand_as(corner))
            expected = parts[:, :, top : top + 8, left : left + 8].sum((2, 3))
            torch.testing.assert_close(
                corner[..., 0, 0],
                expected,
                rtol=0.05,
                atol=0.05 * float(parts.sum((2, 3)).abs().max()),
            )
    assert sum(passes) <= 2 * (LIME_IMAGES + 2)
    again = attribution_maps("lime", model, images[:1], TARGETS[:1], [None])[None].double() / 3
    assert torch.equal(again, found[:1])


def test_integrated_gradients_start_from_black():
    """Their sum is the logit less that of a black image, dynamic weights and all."""
    model, images = PlantedCoDA().double(), rand(2, 3, 4, 4)
    found = attribution_maps("integrated_gradients", model, images, TARGETS, [None])[None].sum(
        (2, 3)
    )
    black = model(torch.zeros_like(images)).gather(1, TARGETS)
    torch.testing.assert_close(
        found, model(images).gather(1, TARGETS) - black, rtol=1e-3, atol=1e-4
    )


def test_guided_backprop_lets_only_positive_gradients_through_a_relu():
    weight, images = rand(3, 3, 2, 2) - 0.5, rand(2, 3, 2, 2, seed=1) - 0.5
    found = attribution_maps("guided_backprop", rectified(weight), images, TARGETS, [None])[None]
    torch.testing.assert_close(found, (weight[TARGETS].clamp(min=0) * (images[:, None] > 0)).sum(2))


def test_deep_lift_shares_out_the_difference_to_black():
    weight, images = rand(3, 3, 2, 2) - 0.5, rand(2, 3, 2, 2, seed=1) - 0.5
    found = attribution_maps("deep_lift", rectified(weight), images, TARGETS, [None])[None]
    torch.testing.assert_close(
        found, (weight[TARGETS] * images[:, None].clamp(min=0)).sum(2), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("at", ["stem", "stage1.0", "stage2.0", "head"])
def test_gradcam_and_input_x_gradient_at_any_layer(at):
    """They use gradients of the rest of the network, which go through the dynamic weights.

    Explanation mode would hold these fixed.
    """
    model, images = PlantedCoDA(conventional=True).double().eval(), rand(2, 3, 6, 6)
    kept = []
    with model.get_submodule(at).register_forward_hook(
        lambda module, inputs, output: kept.append(output) or output * 1
    ):
        logits = model(images)
    gradients = [
        torch.autograd.grad(logits.gather(1, TARGETS[:, k, None]).sum(), kept, retain_graph=True)[0]
        for k in (0, 1)
    ]
    activation = kept[0].detach()
    products = torch.stack([(activation * g).sum(1) for g in gradients], 1)
    cams = torch.stack(
        [functional.relu((activation * g.mean((2, 3), keepdim=True)).sum(1)) for g in gradients], 1
    )
    torch.testing.assert_close(
        attribution_maps("input_x_gradient", model, images, TARGETS, [at])[at], products
    )
    torch.testing.assert_close(attribution_maps("gradcam", model, images, TARGETS, [at])[at], cams)
    own = attribution_maps("contributions", model, images, TARGETS, [at])[at]
    assert torch.equal(
        own, layer_contributions(model, images, TARGETS, [at], sum_channels=True)[at]
    )
    if at not in ("head", "stage2.0"):
        assert not torch.allclose(own, products * model.temperature)


def test_real_dau_layers_and_every_method_leave_no_trace():
    torch.manual_seed(0)
    model = timm.create_model("coda_resnet20", conv_stages=2, rank=2, num_classes=3).train()
    # This state must come back.
    model.stage3[0].explaining = True
    before, images = flags(model), rand(2, 3, 12, 12).float()
    layers = explainable_layers(model, images)
    for method in METHODS:
        place = own_place(method, layers).name
        with torch.inference_mode():
            maps = attribution_maps(method, model, images, TARGETS, [place])[place]
        assert maps.isfinite().all()
        assert maps.shape[:2] == (2, 2)
        assert at_input_size(maps, 12, 12).shape == (2, 2, 12, 12)
        assert method == "gradcam" or maps.abs().sum() > 0, method
        assert flags(model) == before, method
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        for module in model.modules()
    )


@pytest.mark.parametrize(
    ("method", "instead"), [("guided_backprop", "gradient"), ("deep_lift", "input_x_gradient")]
)
def test_methods_that_would_only_repeat_another_are_refused(method, instead):
    with pytest.raises(UserError, match=f"no.*{instead}"):
        check_method(PlantedCoDA(), method)
    check_method(PlantedCoDA(conventional=True), method)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (
            RuntimeError("A Module was detected that lacks what is required for DeepLift to work"),
            UserError,
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("shapes differ"), RuntimeError),
    ],
)
def test_only_models_that_deep_lift_cannot_read_are_refused(monkeypatch, error, raised):
    def attribute(*_, **__):
        raise error

    monkeypatch.setattr("captum.attr.DeepLift.attribute", attribute)
    with pytest.raises(raised):
        attribution_maps(
            "deep_lift", PlantedCoDA(conventional=True).double(), rand(2, 3, 4, 4), TARGETS, [None]
        )


def test_where_methods_are_defined():
    layers = explainable_layers(PlantedCoDA(), rand(1, 3, 4, 4).float())
    for method in METHODS:
        names = [layer.name for layer in places(method, layers)]
        expected = [layer.name for layer in layers] if method in BY_LAYER else [None]
        # GradCAM pools the gradients of a layer, and the input is not one.
        assert names == (expected[:-1] if method == "gradcam" else expected)
        assert own_place(method, layers).name == ("head" if method == "gradcam" else None)


def test_nearest_up_sampling():
    large = at_input_size(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 4, 4)[0, 0]
    assert large.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
