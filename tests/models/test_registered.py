"""Every registered model keeps timm's contract, which is also that of timm's own test-suite."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from family import CODA, PLAIN, build, images, size_of
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules, group_parameters
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor


@pytest.fixture(scope="module", params=[*CODA, *PLAIN])
def built(request):
    """(name, model in evaluation mode); tests that change the model copy it."""
    return request.param, build(request.param).eval()


def test_registering_beside_all_of_timm_gives_no_warning():
    code = (
        "import timm, pipeline, pipeline.models.coda; "
        "timm.create_model('coda_s'); timm.create_model('resnet18')"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_every_parameter_gets_a_gradient(built):
    name, model = built[0], copy.deepcopy(built[1]).train()
    logits = model(images(name))
    assert logits.shape == (2, 10)
    nn.functional.binary_cross_entropy_with_logits(logits, torch.eye(10)[:2]).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@torch.no_grad()
def test_head_and_classifier(built):
    name, model = built[0], copy.deepcopy(built[1])
    x = images(name)
    features, logits = model.forward_features(x), model(x)
    assert features.shape[:2] == (2, model.num_features)
    torch.testing.assert_close(model.forward_head(features), logits)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(copy.deepcopy(model)(x), logits)
    build(name).load_state_dict(model.state_dict(), strict=True)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.get_classifier() is model.head.classifier
    assert not model.head.training
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(7, "max")
    torch.testing.assert_close(build(name, num_classes=0).eval()(x).shape, pooled.shape)
    assert build(name, num_classes=0, global_pool="").eval()(x).shape == features.shape


def test_default_cfg_names_what_there_is(built):
    model, cfg = built[1], built[1].default_cfg
    assert {
        f"{cfg['classifier']}.weight",
        f"{cfg['first_conv']}.weight",
    } <= model.state_dict().keys()
    assert (cfg["mean"], cfg["std"]) == ((0, 0, 0), (1, 1, 1))
    assert cfg["input_size"][0] == model.in_chans
    reduction = model.feature_info[-1]["reduction"]
    assert cfg["pool_size"] == tuple(math.ceil(side / reduction) for side in cfg["input_size"][1:])


@torch.no_grad()
def test_feature_levels_are_true(built):
    name, model = built
    x = images(name)
    info = FeatureInfo(copy.deepcopy(model.feature_info), tuple(range(len(model.feature_info))))
    final, levels = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(levels[-1], final)
    for level, channels, reduction in zip(levels, info.channels(), info.reduction(), strict=True):
        assert level.shape[1:] == (
            channels,
            math.ceil(size_of(name) / reduction),
            math.ceil(size_of(name) / reduction),
        )
    (second,) = model.forward_intermediates(
        x, indices=[-len(levels) + 1], stop_early=True, intermediates_only=True, norm=True
    )
    torch.testing.assert_close(second, levels[1])
    ended, last = model.forward_intermediates(x, indices=1)
    assert len(last) == 1
    assert torch.equal(last[0], ended)
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")
    backbone = build(name, features_only=True).eval()
    assert backbone.feature_info.channels() == info.channels()
    assert backbone.feature_info.reduction() == info.reduction()
    for output, level in zip(backbone(x), levels, strict=True):
        torch.testing.assert_close(output, level)


def test_pruned_networks_end_at_the_tap_and_train_all_that_is_left(built):
    name, model = built
    x = images(name)
    with torch.no_grad():
        levels = model.forward_intermediates(x, intermediates_only=True)
        whole = copy.deepcopy(model)
        whole.prune_intermediate_layers([len(levels) - 1], prune_head=False)
        torch.testing.assert_close(whole(x), model(x))
    for index in (0, 1):
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([index]) == [index]
        features = pruned.forward_features(x)
        torch.testing.assert_close(features, levels[index])
        features.sum().backward()
        assert all(parameter.grad is not None for parameter in pruned.parameters())
        pruned.reset_classifier(3, model.head.pool_type)
        assert pruned(x).shape == (2, 3)


def test_gradient_checkpointing_changes_nothing(built):
    name, model = built[0], copy.deepcopy(built[1])
    logits = model(images(name))
    logits.sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images(name)), logits)
    model(images(name)).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
        )


def test_layer_decay_orders_the_layers_and_spares_biases(built):
    model = built[1]
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    head = {key for key in layers if key.startswith("head.")}
    assert {layers[key] for key in head} == {max(layers.values())}
    first = next(iter(dict(model.named_parameters())))
    assert layers[first] == 0
    assert len(set(layers.values())) > len(model.stage_names)
    assert (
        len(set(group_parameters(model, model.group_matcher(coarse=True), reverse=True).values()))
        == len(model.stage_names) + 1
    )
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5)
    groups = {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }
    named = dict(model.named_parameters())
    scales = {key: groups[id(parameter)]["lr_scale"] for key, parameter in named.items()}
    assert all(scales[key] == 1 for key in head)
    assert scales[first] == min(scales.values()) < 1
    for key, parameter in named.items():
        assert (groups[id(parameter)]["weight_decay"] == 0) == (
            key.endswith("up_bias") or parameter.ndim == 1
        ), key


@torch.no_grad()
def test_other_inputs(built):
    name, model = built
    x = images(name)
    torch.testing.assert_close(
        model(x.contiguous(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-4
    )
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last(x), model(x), rtol=1e-4, atol=1e-4)
    assert model(torch.rand(1, 3, 2 * x.shape[2], x.shape[2] + 5)).shape == (1, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.forward_features(x).float()
    exact = model.forward_features(x)
    assert (rounded - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", ["coda_s", "coda_resnet20", "coda_resnet50", "resnet20"])
@pytest.mark.parametrize("channels", [1, 4])
def test_other_input_channels(name, channels):
    model = build(name, in_chans=channels)
    assert model.in_chans == channels
    assert model(images(name, channels=channels)).shape == (2, 10)


@pytest.mark.parametrize("name", ["coda_s", "coda_resnet50", "resnet20"])
def test_device_and_type_of_the_parameters(name):
    model = build(name, device="meta", dtype=torch.float64)
    model.reset_classifier(3)
    assert all(
        parameter.device.type == "meta" and parameter.dtype == torch.float64
        for parameter in model.parameters()
    )
    assert model(torch.empty(2, 3, 64, 64, device="meta", dtype=torch.float64)).shape == (2, 3)
    assert (
        build(name, dtype=torch.float64).eval()(images(name, dtype=torch.float64)).dtype
        == torch.float64
    )


@torch.no_grad()
def test_a_compiled_network_agrees():
    model, x = build("coda_resnet20").eval(), images("coda_resnet20")
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


@torch.no_grad()
def test_feature_extraction_by_graph_sees_a_dau_as_one_node():
    model, x = build("coda_resnet20").eval(), images("coda_resnet20")
    leaves = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    graph = create_feature_extractor(model, ["stage3.1", "head.classifier"], tracer_kwargs=leaves)(
        x
    )
    torch.testing.assert_close(
        graph["head.classifier"].sum((2, 3)) / model.temperature + model.logit_bias, model(x)
    )
