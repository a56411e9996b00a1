"""The dry run counts what is counted by hand, and times follow formulas."""

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

# Registers the CoDA models.
import pipeline  # noqa: F401
from pipeline.cli import main
from pipeline.planning.cluster import Cluster
from pipeline.planning.cost import cost
from pipeline.planning.cpu_plan import cpu_step
from pipeline.planning.cpu_profile import CPUProfile
from pipeline.planning.dry_run import Operation, trace
from pipeline.planning.gpus import ATTAINABLE, ATTAINABLE_BANDWIDTH, GPUS, gpu_seconds
from pipeline.planning.plan import Plan
from pipeline.planning.report import gpu_report
from pipeline.planning.update import update_products
from pipeline.recipe.load import load

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "cifar10_coda_resnet20.yaml"
H100 = GPUS["h100"]


def test_a_dry_run_counts_and_keeps_what_is_counted_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5)
    ).to("meta")
    work = trace(net, (3, 8, 8), 2, fused=True)
    convolution, linear = 2 * 64 * 4 * 27, 2 * 256 * 5
    # The image needs no gradient.
    assert work.multiply_adds == convolution * 2 + linear * 3
    image, feature_map = 4 * 2 * 3 * 64, 4 * 2 * 4 * 64
    assert image + 2 * feature_map <= work.peak_bytes <= image + 5 * feature_map
    of_convolution = [operation for operation in work.operations if operation.kind == "convolution"]
    assert [operation.backward for operation in of_convolution] == [False, True]
    assert of_convolution[0].bytes == image + feature_map + 4 * 4 * 27


@pytest.mark.parametrize("name", ["coda_resnet20", "coda_s"])
def test_fused_and_chunked_layers_multiply_alike(name):
    model = timm.create_model(name, device="meta")
    fused, chunked = (
        trace(model, (3, 16, 16), 2, fused=choice).multiply_adds for choice in (True, False)
    )
    forward = 2 * cost(model, (3, 16, 16)).multiply_adds
    assert 2.5 * forward < fused < 4.5 * forward
    # By unit a layer saves the norm's products, by rank it factorises A.
    assert chunked == pytest.approx(fused, rel=0.35)


def test_the_roofline_is_the_longer_of_computing_and_moving():
    heavy = Operation("convolution", False, 10**12, 10**6, 10**6, True)
    seconds, bound = gpu_seconds(heavy, H100, bf16=True)
    assert (seconds, bound) == (
        pytest.approx(2e12 / (989e12 * ATTAINABLE["convolution"])),
        "compute",
    )
    wide = dataclasses.replace(heavy, kind="elementwise", multiply_adds=0, bytes=10**9)
    seconds, bound = gpu_seconds(wide, H100, bf16=True)
    assert (seconds, bound) == (pytest.approx(1e9 / (3.35e12 * ATTAINABLE_BANDWIDTH)), "memory")


def test_reductions_take_rings_inside_and_between_nodes():
    assert Cluster(1, 1, H100).reduction_seconds(1e9) == 0
    within, across = (
        Cluster(1, 8, H100).reduction_seconds(1e9),
        Cluster(2, 8, H100).reduction_seconds(1e9),
    )
    assert within == pytest.approx(2 * 7 / 8 * 1e9 / 450e9, rel=0.03)
    assert across == pytest.approx(max(2 * 7 / 8 * 1e9 / 450e9, 1e9 / (8 * 50e9)), rel=0.05)
    assert Cluster(512, 8, H100).reduction_seconds(1e9) > across


def test_memory_grows_with_the_batch_and_zero_shards_it():
    plan = Plan(load(RECIPE))
    assert plan.activation_bytes(200) - plan.activation_bytes(100) == pytest.approx(
        100 * 1.7e6, rel=0.1
    )
    largest = plan.largest_micro_batch(Cluster(1, 1, H100))
    assert plan.activation_bytes(largest) < H100.memory < 1.2 * plan.activation_bytes(largest)
    sharded = Plan(
        load(RECIPE, ["training.zero_stage=2", "training.weight_average=0.99"])
    ).state_bytes(8)
    whole = plan.state_bytes(8)
    assert sharded["optimiser"] == whole["optimiser"] / 8
    assert sharded["gradients"] == whole["gradients"] / 8
    assert sharded["weight average"] == whole["weights"]


def test_an_update_of_muon_multiplies_matrices_as_counted_by_hand():
    # Two matrices, 6 x 36 and 2 x 5; biases do not count.
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(5, 2)).to("meta")
    counted = 5 * (2 * 6 * 6 * 36 + 6**3 + 2 * 2 * 2 * 5 + 2**3)
    assert sum(operation.multiply_adds for operation in update_products(net, "muon")) == counted
    assert list(update_products(net, "adamw")) == []
    muon, adamw = (Plan(load(RECIPE, [f"training.optimizer={name}"])) for name in ("muon", "adamw"))
    cluster = Cluster(1, 8, H100)
    assert muon.state_bytes(8)["optimiser"] == adamw.state_bytes(8)["optimiser"] / 2
    assert muon.step(32, cluster, 64, 64).seconds > adamw.step(32, cluster, 64, 64).seconds


def test_a_batch_that_does_not_fit_is_said_with_one_that_does():
    small = dataclasses.replace(H100, memory=3e9)
    text = gpu_report(Plan(load(RECIPE, ["training.global_batch_size=4096"])), Cluster(1, 1, small))
    assert "DOES NOT FIT" in text
    assert "training.micro_batch_size=" in text


def test_steps_follow_a_profile():
    curves = ["product", "copy", "elementwise new", "elementwise in place"]
    curves += [
        f"{kind} {way}" for kind in ("normalisation", "pooling") for way in ("forward", "backward")
    ]
    curves += [
        f"convolution {kind} {way}"
        for kind in ("narrow", "3x3", "1x1")
        for way in ("forward", "backward")
    ]
    profile = CPUProfile(
        "",
        {
            "starts": [(1, 1e6)],
            "in sequence": [(1, 1.0)],
            **{name: [(1, 1e9), (100, 4e9)] for name in curves},
        },
    )
    assert profile.at("copy", 10) == pytest.approx(2e9)
    assert profile.at("copy", 10**6) == pytest.approx(4e9)
    model = timm.create_model("resnet20", device="meta")
    seconds, peak = cpu_step(model, (3, 32, 32), 8, profile)
    work = trace(model, (3, 32, 32), 8, fused=False)
    assert seconds > work.multiply_adds / 4e9
    assert peak == work.peak_bytes + 16 * sum(parameter.numel() for parameter in model.parameters())


def test_the_command(capsys):
    assert main(["plan", str(RECIPE), "--gpu", "a100", "--nodes", "2"]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("2 x 8 A100", "GPU-hours", "| 4,096 |", "assumptions:"))
    assert main(["plan", str(RECIPE), "--gpu", "b900"]) == 2
    assert "valid: h200, h100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes is 0; it must be at least 1"),
        (["--gpus-per-node", "7"], "not a multiple of micro batch"),
        (["data.source=imagefolder"], "say how many with --images"),
        (["model.name=coda_resnet21"], "is not a timm model"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["plan", str(RECIPE), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert torch.get_default_device() == torch.device("cpu")
