"""Cosines of planted weights and inputs, and against weights that are formed one by one."""

import math

import pytest
import torch
from planted_models import PlantedCoDA, rand
from torch import nn
from torch.nn import functional

from pipeline.interpret.alignment import BINS, alignment_histograms, cosines, distribution
from pipeline.models.dau import DAUConv2d


def formed(layer, x):
    """cos(w, x) with every dynamic weight held, (N, O)."""
    # (B, d, L), d ordered channel, row, column
    patches = functional.unfold(x, layer.kernel_size, stride=layer.stride, padding=layer.padding)
    z = torch.einsum("rd,bdl->brl", layer.down.weight.flatten(1), patches)
    # Ordered as in the layer: row, column, channel.
    patches = patches.unflatten(1, (x.shape[1], -1)).transpose(1, 2).flatten(1, 2)
    w = torch.einsum("odr,brl->bodl", layer.up_weight, z)
    w = w if layer.up_bias is None else w + layer.up_bias[None, :, :, None]
    return (
        functional.cosine_similarity(w, patches[:, None], dim=2, eps=0)
        .transpose(1, 2)
        .flatten(0, 1)
    )


@pytest.mark.parametrize("norm", ["sq", "l2", "wb"])
@pytest.mark.parametrize(("kernel", "stride", "rank"), [(3, 2, 3), (1, 1, 2), (3, 1, 20)])
def test_equals_the_cosine_with_formed_weights(norm, kernel, stride, rank):
    torch.manual_seed(0)
    layer = DAUConv2d(
        4, 5, kernel, stride=stride, padding=kernel // 2, rank=rank, norm=norm
    ).double()
    x = rand(2, 4, 7, 6) - 0.3
    with torch.no_grad():
        torch.testing.assert_close(cosines(layer, x), formed(layer, x), rtol=1e-9, atol=1e-10)


def planted():
    """Unit 0 has the input itself as weight, unit 1 its negative, unit 2 zero."""
    layer = DAUConv2d(4, 3, 1, rank=4, norm="wb")
    layer.down.weight.data = torch.eye(4)[:, :, None, None]
    layer.up_weight.data = torch.stack([torch.eye(4), -3 * torch.eye(4), torch.zeros(4, 4)])
    return layer


def test_planted_alignment():
    x = rand(2, 4, 3, 3).float() - 0.5
    # A patch of zeros has no direction.
    x[0, :, 0, 0] = 0
    found = cosines(planted(), x).detach()
    assert found[0].isnan().all()
    assert found[:, 2].isnan().all()
    torch.testing.assert_close(found[1:, :2], torch.tensor([1.0, -1.0]).expand(17, 2))
    histogram = alignment_histograms(nn.Sequential(planted(), nn.Flatten()), x)["0"]
    assert histogram.sum() == 34
    assert histogram[0] == histogram[-1] == 17


def test_distribution_of_known_values():
    values = torch.linspace(-0.9, 0.1, 10_001, dtype=torch.float64)
    found = distribution(torch.histc(values, BINS, -1, 1))
    expected = {"mean": -0.4, "q25": -0.65, "median": -0.4, "q75": -0.15}
    assert all(abs(found[key] - value) < 2e-3 for key, value in expected.items())
    assert all(math.isnan(value) for value in distribution(torch.zeros(BINS)).values())


def test_layers_come_from_the_output_and_batches_add_up():
    model = nn.Sequential(
        DAUConv2d(3, 4, 3, rank=2), DAUConv2d(4, 2, 1, rank=2), nn.Flatten()
    ).train()
    images = rand(4, 3, 5, 5).float()
    whole, halves = (
        alignment_histograms(model, images),
        [alignment_histograms(model, images[k : k + 2]) for k in (0, 2)],
    )
    assert list(whole) == ["1", "0"]
    assert model.training
    for name, histogram in whole.items():
        assert torch.equal(histogram, halves[0][name] + halves[1][name])
    assert alignment_histograms(PlantedCoDA(), images[:, :, :4, :4]) == {}
