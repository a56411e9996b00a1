"""The CoDA part of every network is exactly dynamic linear, wherever it begins."""

import pytest
import torch
from family import CODA, build, dau_names, images, junctions

from pipeline.interpret.contributions import exact_layers, explainable_layers, layer_contributions

OTHER_NORMS = [
    (name, {**args, "norm": norm})
    for norm in ("l2", "wb")
    for name, args in junctions(["coda_s", "coda_resnet18"])
]


@pytest.mark.parametrize(("name", "args"), [*junctions(CODA), *OTHER_NORMS])
def test_contributions_of_every_layer_sum_to_the_logit(name, args):
    model = build(name, **args).double().eval()
    x, targets = images(name, dtype=torch.float64), torch.tensor([[1, 2], [3, 4]])
    layers = [layer.name for layer in exact_layers(model, explainable_layers(model, x))]
    assert set(dau_names(model)) < set(layers)
    outputs = model.temperature * (model(x).detach().gather(1, targets) - model.logit_bias)
    for layer, terms in layer_contributions(model, x, targets, layers).items():
        error = (terms.sum((2, 3, 4)) - outputs).abs() / terms.abs().sum((2, 3, 4))
        assert error.max() <= 1e-5, f"{layer}: {error.max():.1e}"
    assert (outputs != 0).all()
