"""The registered names, each built small enough to run in a moment, at its real depth."""

import timm
import torch

from pipeline.models.dau import DAUConv2d

CODA = timm.list_models("coda_*")
HYBRIDS = [name for name in CODA if "resnet" in name]
PLAIN = ["resnet8", "resnet20", "resnet56"]
ON_CIFAR = ["coda_resnet8", "coda_resnet20", "coda_resnet56"]
SIZES = {
    "coda_xs": 16,
    "coda_s": 16,
    "coda_m": 16,
    "coda_xl": 16,
    "coda_l": 48,
    **dict.fromkeys((*PLAIN, *ON_CIFAR), 32),
}
SMALL_RANKS = {"coda_m": 4, "coda_l": 4, "coda_xl": 4}


def size_of(name):
    return SIZES.get(name, 64)


def build(name, seed=0, **kwargs):
    """With ten classes, and low ranks where the default ones are high."""
    torch.manual_seed(seed)
    if name in SMALL_RANKS and not kwargs.get("pretrained"):
        kwargs = {"rank": SMALL_RANKS[name], **kwargs}
    return timm.create_model(name, **{"num_classes": 10, **kwargs})


def images(name, batch=2, channels=3, dtype=torch.float32):
    """Smooth random images, as natural ones are: noise would average out over the positions."""
    coarse = torch.rand(batch, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    size = (size_of(name), size_of(name))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1).to(dtype)


def stages_of(name):
    """How many stages can be conventional."""
    return 3 if name in ON_CIFAR else 4


def junctions(names):
    """(name, arguments) of every network: hybrids with every conv_stages."""
    return [(name, choice) for name in names for choice in choices(name)]


def choices(name):
    return (
        [{"conv_stages": count} for count in range(stages_of(name) + 1)]
        if name in HYBRIDS
        else [{}]
    )


def dau_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, DAUConv2d)]
