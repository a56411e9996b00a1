"""The layers that a depth curve visits, and their distances from the output."""

from collections import OrderedDict

import pytest
import timm
from planted_models import Block, Chain, PlantedCoDA, flags, rand
from torch import nn

import pipeline  # noqa: F401  registers the CoDA models
from pipeline.interpret.contributions import Layer, exact_layers, explainable_layers


def test_layers_and_distances_of_a_known_chain():
    """The order of execution is stem conv, stage1.0, stage1.1, stage2.0, head.

    A dynamic module counts once whatever is inside.
    """
    model = PlantedCoDA(conventional=True).train()
    before = flags(model)
    found = explainable_layers(model, rand(1, 3, 6, 6).float())
    expected = [
        ("head", 0.0),
        ("stage2.0", 0.2),
        ("stage1.1", 0.4),
        ("stage1.0", 0.6),
        ("stem.2", 0.8),
        (None, 1.0),
    ]
    assert [(layer.name, pytest.approx(layer.distance)) for layer in found] == expected
    assert flags(model) == before
    assert not any(module._forward_hooks for module in model.modules())
    pure = explainable_layers(PlantedCoDA(), rand(1, 3, 6, 6).float())
    # The stem is the encoding itself.
    assert [layer.name for layer in pure] == ["head", "stage2.0", "stage1.1", "stage1.0", None]
    # Nothing says where to look.
    assert explainable_layers(Chain(inplace=False).float(), rand(1, 3, 6, 6).float()) == [
        Layer(None, 1.0)
    ]


def test_only_blocks_that_run_once_and_give_maps_are_layers():
    """Of four parametric layers: the dynamic one, the block's convolution, and two linear ones."""
    model = nn.Sequential(
        OrderedDict(block=Block(), flat=nn.Flatten(), fc=nn.Linear(12, 5), last=nn.Linear(5, 2))
    )
    model.feature_info = [{"module": name} for name in ("block", "block.act", "fc")]
    assert explainable_layers(model, rand(1, 3, 2, 2).float()) == [
        Layer("block", 0.5),
        Layer(None, 1.0),
    ]


def test_exact_layers_reach_from_the_output_to_the_junction():
    def exact(model: nn.Module) -> list[str | None]:
        return [
            layer.name
            for layer in exact_layers(model, explainable_layers(model, rand(1, 3, 32, 32).float()))
        ]

    assert exact(PlantedCoDA(conventional=True)) == [
        "head",
        "stage2.0",
        "stage1.1",
        "stage1.0",
        "stem.2",
    ]
    assert exact(PlantedCoDA()) == ["head", "stage2.0", "stage1.1", "stage1.0", None]
    assert exact(timm.create_model("coda_resnet20")) == [
        "head.classifier",
        "stage3.2",
        "stage3.1",
        "stage3.0",
        "stage2.2",
    ]
    assert exact(timm.create_model("resnet20")) == ["stage3.2"]


def test_layers_of_timm_resnet18():
    """20 convolutions and one linear layer; each block's output lies before what runs after it."""
    model = timm.create_model("resnet18")
    names = [layer.name for layer in explainable_layers(model, rand(1, 3, 32, 32).float())]
    blocks = [f"layer{stage}.{block}" for stage in (4, 3, 2, 1) for block in (1, 0)]
    assert names == [*blocks, "act1", None]
    distances = [layer.distance for layer in explainable_layers(model, rand(1, 3, 32, 32).float())]
    later = [1, 3, 6, 8, 11, 13, 16, 18, 20, 21]
    assert distances == pytest.approx([count / 21 for count in later])


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("coda_resnet20", "head.classifier", 12),
        ("coda_s", "head.classifier", 10),
        ("resnet20", None, 11),
    ],
)
def test_layers_of_our_models(name, first, count):
    model = timm.create_model(name).double()
    layers = explainable_layers(model, rand(1, 3, 32, 32))
    assert len(layers) == count
    assert layers[-1] == Layer(None, 1.0)
    distances = [layer.distance for layer in layers]
    assert distances == sorted(set(distances))
    assert distances[0] < 0.06
    if first:
        assert layers[0] == Layer(first, 0.0)
    dynamic = [
        layer.name
        for layer in layers
        if layer.name and hasattr(model.get_submodule(layer.name), "explaining")
    ]
    assert len(dynamic) == {"coda_resnet20": 4, "coda_s": 9, "resnet20": 0}[name]
