"""A hybrid starts from a pretrained ResNet; checkpoints fit other classes and channels."""

import pytest
import timm
import torch
from family import build, images
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.models.create import create
from pipeline.models.dau.functional import Geometry, dynamic_dot


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(3)
    model = timm.create_model("resnet18", num_classes=4).train()
    with torch.no_grad():
        # The batch statistics become other than 0 and 1.
        model(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.fixture(scope="module")
def weights(resnet18, tmp_path_factory):
    path = tmp_path_factory.mktemp("resnet18") / "resnet18.safetensors"
    save_file(resnet18.state_dict(), path)
    return str(path)


def normalised(model, x):
    mean, std = (
        torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std")
    )
    return (x - mean) / std


@torch.no_grad()
@pytest.mark.parametrize("conv_stages", range(5))
def test_the_conventional_part_gives_the_features_of_the_pretrained_resnet(
    resnet18, weights, conv_stages
):
    hybrid = build("coda_resnet18", conv_stages=conv_stages, pretrained_backbone=weights).eval()
    x = images("coda_resnet18")
    expected = resnet18.forward_intermediates(normalised(resnet18, x), intermediates_only=True)
    found = hybrid.forward_intermediates(x, intermediates_only=True)
    for level in range(conv_stages + 1):
        # They agree at the borders, too.
        torch.testing.assert_close(found[level], expected[level], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_torch_file_of_the_plain_cifar_resnet_serves_as_well(tmp_path):
    plain = build("resnet20").eval()
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "resnet20.pth")
    hybrid = build("coda_resnet20", pretrained_backbone=str(tmp_path / "resnet20.pth")).eval()
    x = images("resnet20")
    expected = plain.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
    torch.testing.assert_close(
        hybrid.forward_intermediates(x, indices=[2], intermediates_only=True)[0],
        expected,
        rtol=1e-4,
        atol=1e-4,
    )


@torch.no_grad()
def test_grey_images_give_the_stem_of_their_rgb_copies(weights):
    grey, rgb = (
        build("coda_resnet18", in_chans=channels, pretrained_backbone=weights).eval()
        for channels in (1, 3)
    )
    x = images("coda_resnet18", channels=1)
    torch.testing.assert_close(
        grey.stem(grey.encode(x)),
        rgb.stem(rgb.encode(x.expand(-1, 3, -1, -1))),
        rtol=1e-4,
        atol=1e-4,
    )


def test_wrong_sources_are_one_line(weights, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"not a file of weights")
    for name, source, complaint in (
        (
            "coda_resnet50",
            weights,
            r"does not fit: stage1.0.conv1.weight has \(64, 64, 3, 3\), "
            r"this model needs \(64, 64, 1, 1\)",
        ),
        ("coda_resnet34", weights, "stage1.2.conv1.weight is missing"),
        ("coda_resnet18", str(tmp_path / "none.safetensors"), "cannot be read"),
        ("coda_resnet18", str(tmp_path / "cut.safetensors"), "cannot be read"),
        ("coda_resnet18", "resnet_18", "neither a file"),
    ):
        args = {"pretrained_backbone": source}
        with pytest.raises(UserError, match=complaint) as error:
            create(name, args, 10)
        assert "\n" not in str(error.value)
        # Where trained weights will come, the source need not be there.
        create(name, args, 10, fresh=False)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "args"),
    [("coda_s", {"rank": 4}), ("coda_resnet20", {}), ("coda_resnet18", {"conv_stages": 4})],
)
def test_a_checkpoint_is_loaded_whole_or_without_its_classifier(name, args, tmp_path):
    source = build(name, num_classes=6, **args).eval()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(5)
    file = str(tmp_path / "model.safetensors")
    same = timm.create_model(
        name,
        pretrained=True,
        num_classes=6,
        pretrained_cfg_overlay=dict(file=file, num_classes=6),
        **args,
    ).eval()
    x = images(name)
    torch.testing.assert_close(same(x), source(x))
    for overlay in (dict(file=file), dict(file=file, num_classes=6)):
        other = timm.create_model(
            name, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay, **args
        ).eval()
        torch.testing.assert_close(other.forward_features(x), source.forward_features(x))
        assert other(x).shape == (2, 7)
    backbone = timm.create_model(
        name, pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=file), **args
    ).eval()
    torch.testing.assert_close(backbone(x)[-1], source.forward_features(x))


def first_dot(model, x):
    """Dot products of the first layer's dynamic weights and inputs, without the rescaling."""
    layer, encoded = model.stage1[0], model.encode(x)
    z = layer.down(encoded).permute(0, 2, 3, 1).reshape(-1, layer.rank)
    return dynamic_dot(encoded, z, layer.up_weight, layer.up_bias, Geometry(3, 1, 1), False, layer)[
        0
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", ["coda_s", "coda_resnet20"])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_checkpoint_fits_other_input_channels(name, channels, tmp_path):
    args = {"rank": 4, "norm": "wb"} if name == "coda_s" else {}
    source = build(name, **args).eval()
    file = str(tmp_path / "model.safetensors")
    save_file(source.state_dict(), file)
    model = timm.create_model(
        name, pretrained=True, in_chans=channels, pretrained_cfg_overlay=dict(file=file), **args
    ).eval()
    x = images(name, channels=1)
    # A convolution sums over the channels.
    if channels == 1 and name == "coda_resnet20":
        torch.testing.assert_close(model(x), source(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    # So does the dot product of a DAU.
    if channels == 1 and name == "coda_s":
        torch.testing.assert_close(
            first_dot(model, x), first_dot(source, x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
        )
    assert model(x.expand(-1, channels, -1, -1)).isfinite().all()
    first, *rest = model.state_dict(), source.state_dict()
    later = [key for key in rest[0] if not key.startswith(("stem.conv1", "stage1.0."))]
    assert later
    assert all(torch.equal(first[key], rest[0][key]) for key in later)
