"""The cost table counts what it says, and the default hybrids stay within their budget."""

from pathlib import Path

import pytest
import timm
import torch
from models.family import HYBRIDS
from torch import nn

from pipeline.cli import main
from pipeline.models.dau import DAUConv2d
from pipeline.planning.cost import cost, dau_multiply_adds, peer, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_counts_of_networks_that_are_counted_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 5),
    ).to("meta")
    counted = cost(net, (3, 8, 8))
    assert counted.parameters == 4 * 27 + 64 * 5 + 5
    assert counted.multiply_adds == 16 * 4 * 27 + 64 * 5
    # The image, and the rectified map that both ReLU and Linear keep.
    assert counted.activation_bytes == 4 * (3 * 64 + 4 * 16)


def test_a_dau_costs_its_three_products():
    layer = DAUConv2d(2, 5, 3, rank=4)
    projection, products, norms = 18 * 4, 5 * (18 * 4 + 18 + 4), 5 * 5 * 5
    assert dau_multiply_adds(layer, 10) == 10 * (projection + products + norms)
    bound = DAUConv2d(2, 5, 3, rank=4, norm="wb")
    assert dau_multiply_adds(bound, 10) == 10 * (projection + 5 * (18 * 4 + 4))


@pytest.mark.parametrize("name", HYBRIDS)
def test_default_hybrids_cost_at_most_half_as_much_again_as_their_resnet(name):
    defaults = timm.get_pretrained_cfg(name)
    networks = [
        timm.create_model(each, num_classes=defaults.num_classes, device="meta")
        for each in (name, peer(name))
    ]
    hybrid, plain = (cost(network, defaults.input_size) for network in networks)
    assert hybrid.parameters <= 1.5 * plain.parameters
    assert hybrid.multiply_adds <= 1.5 * plain.multiply_adds


def test_the_page_holds_the_commands_table(capsys):
    assert main(["models", "coda_resnet20"]) == 0
    counted = [
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if "coda_" in line
    ]
    written = [
        line.split(" | ")
        for line in PAGE.read_text().splitlines()
        if line.startswith("| `coda_resnet20` | ")
    ]
    assert len(counted) == len(written) == 4
    for now, then in zip(counted, written, strict=True):
        assert [cell.strip(" |") for cell in now] == [cell.strip(" |") for cell in then[:8]]


def test_networks_are_compared_with_a_resnet_for_images_of_their_size():
    assert peer("coda_resnet20") == "resnet20"
    pure = {name: peer(f"coda_{name}") for name in ("xs", "s", "m", "l", "xl")}
    assert pure == dict.fromkeys(("xs", "s", "m"), "resnet20") | dict.fromkeys(
        ("l", "xl"), "resnet18"
    )


def test_every_network_of_ours_has_a_plain_one():
    assert all(timm.is_model(peer(name)) for name in timm.list_models("coda_*"))


def test_time_is_measured_and_wrong_names_are_one_line(capsys):
    torch.manual_seed(0)
    assert "CPU time" in table(["coda_resnet20"], timed=True)
    assert main(["models", "coda_resnet19"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("coda: model 'coda_resnet19'")
