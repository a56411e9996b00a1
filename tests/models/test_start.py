"""Networks train from where they start.

Logits are calm, gradients of like size at both ends, and 64 images are learnt by heart.
"""

import math
import statistics

import pytest
import torch
from family import CODA, build, images, junctions
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from pipeline.models.dau import DAUConv2d


def parametric_layers(model):
    daus = [module for module in model.modules() if isinstance(module, DAUConv2d)]
    inside = {id(part) for dau in daus for part in dau.children()}
    return [
        m for m in model.modules() if isinstance(m, DAUConv2d | nn.Conv2d) and id(m) not in inside
    ]


def sensitivity(layer):
    """Compute |dL/dtheta| |theta| of a layer.

    It says how much the loss feels a relative change of its weights, whatever their scale and
    number.
    """
    gradient, size = (
        sum(float(t.square().sum()) for t in ts)
        for ts in zip(*[(p.grad, p.detach()) for p in layer.parameters()], strict=True)
    )
    return math.sqrt(gradient * size)


def first_to_last(name, args, seed=0):
    """Sensitivity of the first layer by that of the last, before training."""
    model = build(name, seed, **args)
    loss = binary_cross_entropy_with_logits(
        model(images(name, batch=4)), torch.eye(10)[:4], reduction="sum"
    )
    loss.backward()
    first, *_, last = map(sensitivity, parametric_layers(model))
    return first / last


@pytest.mark.parametrize(("name", "args"), junctions(CODA))
def test_first_and_last_layer_feel_gradients_of_like_size(name, args):
    assert 0.01 < first_to_last(name, args) < 100


@pytest.mark.parametrize("norm", ["l2", "wb"])
@pytest.mark.parametrize(
    ("name", "args"),
    [("coda_s", {}), ("coda_resnet20", {"conv_stages": 0}), ("coda_resnet18", {"conv_stages": 0})],
)
def test_first_and_last_layer_with_other_norms(name, args, norm):
    # With wb the ratio differs from one draw to the next by a factor of four.
    assert (
        0.01
        < statistics.median(first_to_last(name, {**args, "norm": norm}, seed) for seed in range(3))
        < 100
    )


@torch.no_grad()
@pytest.mark.parametrize(("name", "args"), junctions(CODA))
def test_untrained_logits_are_near_the_bias(name, args):
    model, x = build(name, **args), images(name)
    for scale in (1, 2):
        # Batch statistics are used, as in training.
        logits = model(interpolate(x, scale_factor=scale, mode="bicubic").clamp(0, 1))
        assert (logits - model.logit_bias).abs().max() < 1
    outputs = model.temperature * (logits - model.logit_bias)
    assert outputs.std() > 1e-3, "a signal that vanishes on its way cannot be trained"


def digits(size):
    data = load_digits()
    x = torch.tensor(data.images[:64] / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    return interpolate(x, size=(size, size), mode="bilinear"), torch.tensor(data.target[:64])


@pytest.mark.parametrize(
    ("name", "size", "learning_rate", "args"),
    [
        ("coda_s", 8, 3e-3, {"rank": 8, "temperature": 10.0}),
        ("coda_resnet20", 16, 3e-3, {"temperature": 64.0}),
        ("coda_resnet20", 16, 3e-3, {"temperature": 64.0, "conv_stages": 0, "norm": "wb"}),
        ("coda_resnet18", 32, 1e-3, {"temperature": 10.0}),
    ],
)
def test_64_real_images_are_learnt_by_heart(name, size, learning_rate, args):
    """The temperature is scaled to the number of positions.

    The outputs are bounded by the norm of the features at each position.
    """
    (x, y), model = digits(size), build(name, **args)
    targets = nn.functional.one_hot(y, 10).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        batch = torch.randperm(64, generator=generator)[:16]
        loss = (
            binary_cross_entropy_with_logits(model(x[batch]), targets[batch], reduction="sum") / 16
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            with torch.no_grad():
                if (model(x).argmax(1) == y).all():
                    return
    pytest.fail(f"not learnt after 300 steps; loss {loss.item():.3f}")
