"""Every registered model keeps timm's contract, learns in every parameter, and is exactly dynamic linear in its CoDA part."""

import copy
import math
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import pipeline.models.coda_resnet as coda_resnet
from pipeline.models.dau import DAUConv2d

CODA = timm.list_models("coda_*")
NAMES = [*CODA, "resnet20"]
SMALL = {"coda_resnet18": 64, "coda_resnet50": 64}


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 10, **kwargs})


def images(name, batch=2):
    size = SMALL.get(name, 32)
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_promised_names_are_registered():
    assert {"coda_s", "coda_resnet20", "coda_resnet18", "coda_resnet50"} <= set(CODA)


def test_registering_beside_all_of_timm_gives_no_warning():
    code = "import timm, pipeline, importlib; import pipeline.models.coda; timm.create_model('coda_s'); timm.create_model('resnet18')"
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model = build(name)
    logits = model(images(name))
    assert logits.shape == (2, 10)
    nn.functional.binary_cross_entropy_with_logits(logits, torch.eye(10)[:2]).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize("name", NAMES)
def test_timm_contract(name):
    model = build(name).eval()
    x = images(name)
    features = model.forward_features(x)
    assert features.shape[:2] == (2, model.num_features)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert isinstance(model.get_classifier(), DAUConv2d | nn.Linear)
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    model.load_state_dict(model.state_dict(), strict=True)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), model.forward_head(features))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)


@pytest.mark.parametrize("name", NAMES)
def test_feature_info_is_true(name):
    backbone = build(name, features_only=True).eval()
    x = images(name)
    outputs = backbone(x)
    assert len(outputs) == len(backbone.feature_info.channels())
    for output, channels, reduction in zip(outputs, backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True):
        assert output.shape[1] == channels
        assert output.shape[2] == math.ceil(x.shape[2] / reduction)


@pytest.mark.parametrize("name", NAMES)
def test_intermediates_end_in_the_features(name):
    model = build(name).eval()
    x = images(name)
    final, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(intermediates[-1], final)
    (second,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(second, intermediates[1])


@pytest.mark.parametrize("name", NAMES)
def test_other_inputs(name):
    model = build(name).eval()
    x = images(name)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-4)
    assert model(torch.rand(1, 3, 2 * x.shape[2], x.shape[2])).shape == (1, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).isfinite().all()
    with pytest.raises(ValueError, match="in_chans"):
        timm.create_model(name, in_chans=1)


@pytest.mark.parametrize("name", CODA)
def test_untrained_logits_are_near_the_bias_and_options_arrive(name):
    model = build(name, temperature=1e5, logit_bias=-1.0, norm="l2", rank=3).eval()
    torch.testing.assert_close(model(images(name)), torch.full((2, 10), -1.0), rtol=0, atol=0.1)
    assert all(module.norm == "l2" for module in model.modules() if isinstance(module, DAUConv2d))
    assert model.get_classifier().rank in (3, 6)  # S-CoDA's ranks double once
    with pytest.raises(ValueError, match="temperature"):
        build(name, temperature=0)


@pytest.mark.parametrize("name", [n for n in CODA if "resnet" in n])
def test_conv_stages_moves_the_junction(name):
    stages = 3 if name == "coda_resnet20" else 4
    for conv_stages in range(stages + 1):
        model = build(name, conv_stages=conv_stages)
        dynamic = [any(isinstance(m, DAUConv2d) for m in getattr(model, f"stage{i + 1}").modules()) for i in range(stages)]
        assert dynamic == [i >= conv_stages for i in range(stages)]
        assert model(images(name)).shape == (2, 10)
    with pytest.raises(ValueError, match="conv_stages"):
        build(name, conv_stages=stages + 1)


def test_black_is_as_visible_as_white():
    assert coda_resnet.CoDAResNet.encode(None, torch.zeros(1, 3, 1, 1)).flatten().tolist() == [0, 0, 0, 1, 1, 1]


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
