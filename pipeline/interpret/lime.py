"""LIME: a linear model of what the superpixels of an image contribute.

Source: Ribeiro et al., arXiv 1602.04938. A ridge regression is fitted to 256 images in which each
superpixel is blanked half of the time. captum and scikit-image are imported when they are needed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.interpret.network import Encoded

# Perturbed images for each image that is explained.
LIME_IMAGES = 256
# Pixels of a superpixel, about.
SUPERPIXEL = 64


def superpixels(encoded: Tensor) -> Tensor:
    """Number the SLIC segments of one encoded image (1, C, H, W) from 0: (1, C, H, W) int64."""
    from skimage.segmentation import slic

    colours = encoded[0, :3].permute(1, 2, 0).cpu().double().numpy()
    wanted = max(2, colours[..., 0].size // SUPERPIXEL)
    segments = torch.from_numpy(slic(colours, n_segments=wanted, start_label=0, channel_axis=-1))
    numbers: Tensor = torch.unique(segments, return_inverse=True)[1]
    return numbers.to(encoded.device).expand(encoded.shape)


def lime(net: Encoded, encoded: Tensor, targets: Tensor, images_at_once: int) -> Tensor:
    """Attribute the logits of K classes to superpixels.

    Args:
        net: the network, of which only the logits are used.
        encoded: encoded images, (B, C, H, W).
        targets: (B, K) int64.
        images_at_once: perturbed images of one forward pass.

    Returns:
        (B, K, C, H, W); each position of a superpixel has the part of the whole superpixel.
    """
    return torch.stack(
        [
            _of_image(net, image[None], classes, images_at_once)
            for image, classes in zip(encoded, targets, strict=True)
        ]
    )


def _of_image(net: Encoded, encoded: Tensor, classes: Tensor, images_at_once: int) -> Tensor:
    """Attribute in one image, (1, C, H, W) to (K, C, H, W).

    All classes see the same perturbed images, so these pass through the network once.
    """
    from captum._utils.models.linear_model import SkLearnRidge
    from captum.attr import Lime

    logits: list[Tensor] = []
    segments, terms = superpixels(encoded), []
    for target in classes.tolist():
        generator, calls = torch.Generator().manual_seed(0), iter(range(LIME_IMAGES + 2))

        def forward(images: Tensor, target: int = target, calls: Iterator[int] = calls) -> Tensor:
            call = next(calls)
            if call == len(logits):
                logits.append(net(images).detach())
            return logits[call][:, target]

        def keep(_: Tensor, generator: torch.Generator = generator, **shape: int) -> Tensor:
            halves = torch.full((1, shape["num_interp_features"]), 0.5)
            return torch.bernoulli(halves, generator=generator).to(encoded.device).long()

        fit = Lime(forward, interpretable_model=SkLearnRidge(alpha=1.0), perturb_func=keep)
        part = fit.attribute(
            encoded,
            baselines=0,
            feature_mask=segments,
            n_samples=LIME_IMAGES,
            perturbations_per_eval=images_at_once,
        )
        terms.append(part[0])
    return torch.stack(terms)
