"""The registered variants: their names, sizes and options, and the junctions of hybrids."""

import subprocess
import sys

import pytest
import timm
import torch
from family import CODA, HYBRIDS, build, dau_names, junctions, stages_of

from pipeline.models.coda_base import encode
from pipeline.models.dau import DAUConv2d

PURE = ["coda_l", "coda_m", "coda_s", "coda_xl", "coda_xs"]


def test_the_promised_names_are_registered():
    hybrids = [f"coda_resnet{depth}" for depth in (8, 18, 20, 34, 50, 56, 101, 152)]
    assert [*PURE, *hybrids] == sorted(CODA, key=lambda name: "resnet" in name)


def test_a_hybrid_has_the_feature_levels_of_its_resnet():
    for name in ("coda_resnet18", "coda_resnet50"):
        assert build(name, features_only=True).feature_info.reduction() == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("name", CODA)
def test_options_arrive(name):
    model = build(
        name, device="meta", temperature=7.0, logit_bias=-1.0, norm="l2", rank=3, coda_width=24
    )
    daus = [model.get_submodule(key) for key in dau_names(model)]
    assert {dau.norm for dau in daus} == {"l2"}
    assert min(dau.rank for dau in daus) <= 3
    assert (model.temperature, model.logit_bias, model.head.temperature) == (7.0, -1.0, 7.0)
    assert daus[0].out_channels == 24 if name in PURE else daus[-2].out_channels == 24
    with pytest.raises(ValueError, match="temperature"):
        build(name, device="meta", temperature=0)
    with pytest.raises(TypeError):
        build(name, device="meta", no_such_option=1)


@pytest.mark.parametrize(("name", "args"), junctions(HYBRIDS))
def test_conv_stages_moves_the_junction(name, args):
    model = build(name, device="meta", **args)
    stages = [model.get_submodule(stage) for stage in model.stage_names]
    dynamic = [any(isinstance(module, DAUConv2d) for module in stage.modules()) for stage in stages]
    assert dynamic == [index > args["conv_stages"] for index in range(stages_of(name) + 1)]
    with pytest.raises(ValueError, match="conv_stages"):
        build(name, device="meta", conv_stages=stages_of(name) + 1)


def test_s_and_l_are_those_of_the_official_code():
    for name, units, ranks, kernels, strides in (
        (
            "coda_s",
            [16, 16, 32, 32, 32, 64, 64, 64, 10],
            [32, 32, *[64] * 7],
            [*[3] * 8, 1],
            [1, 1, 2, 1, 1, 2, 1, 1, 1],
        ),
        (
            "coda_l",
            [16, 32, 32, *[64] * 5, 100],
            [*[64] * 3, *[128] * 3, *[256] * 3],
            [7, *[3] * 8],
            [3, 1, 1, 2, 1, 1, 2, 1, 1],
        ),
    ):
        model = timm.create_model(name, device="meta")
        daus = [model.get_submodule(key) for key in dau_names(model)]
        assert [dau.out_channels for dau in daus] == units
        assert [dau.rank for dau in daus] == ranks
        assert [dau.kernel_size for dau in daus] == kernels
        assert [dau.stride for dau in daus] == strides
        assert [dau.padding for dau in daus] == [kernel // 2 for kernel in kernels]
    assert model.temperature == 100_000


def test_black_is_as_visible_as_white():
    assert encode(torch.zeros(1, 3, 1, 1)).flatten().tolist() == [0, 0, 0, 1, 1, 1]


def test_a_training_step_of_coda_resnet50_at_full_size_fits_in_8_gib():
    code = """
import resource, timm, torch, pipeline
model = timm.create_model("coda_resnet50", num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loss = torch.nn.functional.cross_entropy(model(torch.rand(8, 3, 224, 224)), torch.arange(8))
loss.backward()
optimizer.step()
assert loss.isfinite()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) < 8 * 2**20
