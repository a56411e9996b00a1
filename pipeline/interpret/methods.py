"""Attribution methods under one signature: the network's own contributions, and post-hoc methods
from captum to compare with.

Conventions of Böhle, Fritz, Schiele, arXiv 2109.13004 and its official code: every method
attributes to what the network reads (for CoDA networks the six-channel encoding), keeps signs, and
is summed over channels to one map; integrated gradients takes 20 steps from black; GradCAM has a
ReLU and sits at the layer before the pooling; occlusion blanks windows of 5 or 9 pixels, 2 pixels
apart, in all channels. LIME (Ribeiro et al., arXiv 1602.04938) fits a ridge regression to 256
images in which each superpixel is blanked half of the time. Post-hoc methods see the network as it
is, dynamic weights included, and not in explanation mode. captum and scikit-image are imported by
the methods that need them: the network's own contributions need neither.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.interpret.contributions import Layer, explanation_mode, layer_contributions, parts

INTEGRATION_STEPS = 20
OCCLUSION_STRIDE = 2
# perturbed ones of each image
LIME_IMAGES = 256
# pixels of one, about
SUPERPIXEL = 64
# of one forward pass where a method varies each image many times
IMAGES_AT_ONCE = 64


class Encoded(nn.Module):
    """What captum explains: the model from its encoding on, to one logit per class."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, encoded: Tensor) -> Tensor:
        return parts(self.model).forward_encoded(encoded)


# (network, encoded images (B, C, H, W), encoded black (B, C, H, W), targets (B, K)) -> (B, K, C, H,
# W)
InputMethod = Callable[[Encoded, Tensor, Tensor, Tensor], Tensor]


def _each_class(attribute: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    return torch.stack([attribute(targets[:, k]).detach() for k in range(targets.shape[1])], dim=1)


def _gradient(net: Encoded, encoded: Tensor, black: Tensor, targets: Tensor) -> Tensor:
    from captum.attr import Saliency

    return _each_class(lambda target: Saliency(net).attribute(encoded, target, abs=False), targets)


def _input_x_gradient(net: Encoded, encoded: Tensor, black: Tensor, targets: Tensor) -> Tensor:
    from captum.attr import InputXGradient

    return _each_class(lambda target: InputXGradient(net).attribute(encoded, target), targets)


def _integrated_gradients(net: Encoded, encoded: Tensor, black: Tensor, targets: Tensor) -> Tensor:
    from captum.attr import IntegratedGradients

    size = max(IMAGES_AT_ONCE, len(encoded))
    method = IntegratedGradients(net)
    return _each_class(
        lambda target: method.attribute(
            encoded, black, target, n_steps=INTEGRATION_STEPS, internal_batch_size=size
        ),
        targets,
    )


def _guided_backprop(net: Encoded, encoded: Tensor, black: Tensor, targets: Tensor) -> Tensor:
    from captum.attr import GuidedBackprop

    return _each_class(lambda target: GuidedBackprop(net).attribute(encoded, target), targets)


def _deep_lift(net: Encoded, encoded: Tensor, black: Tensor, targets: Tensor) -> Tensor:
    from captum.attr import DeepLift

    return _each_class(lambda target: DeepLift(net).attribute(encoded, black, target), targets)


def _occlusion(window: int) -> InputMethod:
    def attribute(net: Encoded, encoded: Tensor, black: Tensor, targets: Tensor) -> Tensor:
        """All classes from the same forward passes: captum takes a function with several outputs
        per image.
        """
        from captum.attr import Occlusion

        channels = encoded.shape[1]
        terms = Occlusion(lambda images, classes: net(images).gather(1, classes)).attribute(
            encoded,
            (channels, window, window),
            (channels, OCCLUSION_STRIDE, OCCLUSION_STRIDE),
            baselines=0,
            additional_forward_args=(targets,),
            perturbations_per_eval=max(1, IMAGES_AT_ONCE // len(encoded)),
        )
        return terms.view(*targets.shape, *encoded.shape[1:])  # (B * K, C, H, W) -> (B, K, C, H, W)

    return attribute


def superpixels(encoded: Tensor) -> Tensor:
    """SLIC segments of one encoded image (1, C, H, W): their numbers from 0, (1, C, H, W) int64."""
    from skimage.segmentation import slic

    colours = encoded[0, :3].permute(1, 2, 0).cpu().double().numpy()
    wanted = max(2, colours[..., 0].size // SUPERPIXEL)
    segments = torch.from_numpy(slic(colours, n_segments=wanted, start_label=0, channel_axis=-1))
    return segments.unique(return_inverse=True)[1].to(encoded.device).expand(encoded.shape)


def _lime(net: Encoded, encoded: Tensor, black: Tensor, targets: Tensor) -> Tensor:
    return torch.stack(
        [
            _lime_of_image(net, image[None], classes)
            for image, classes in zip(encoded, targets, strict=True)
        ]
    )


def _lime_of_image(net: Encoded, encoded: Tensor, classes: Tensor) -> Tensor:
    """(K, C, H, W) of one image (1, C, H, W). All classes see the same perturbed images, so these
    pass the network once.
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

        def keep(_: Tensor, generator: torch.Generator = generator, **shape: Any) -> Tensor:
            halves = torch.full((1, shape["num_interp_features"]), 0.5)
            return torch.bernoulli(halves, generator=generator).to(encoded.device).long()

        fit = Lime(forward, interpretable_model=SkLearnRidge(alpha=1.0), perturb_func=keep)
        options = dict(
            feature_mask=segments, n_samples=LIME_IMAGES, perturbations_per_eval=IMAGES_AT_ONCE
        )
        terms.append(fit.attribute(encoded, baselines=0, **options)[0])
    return torch.stack(terms)


INPUT_METHODS: dict[str, InputMethod] = {
    "gradient": _gradient,
    "input_x_gradient": _input_x_gradient,
    "integrated_gradients": _integrated_gradients,
    "guided_backprop": _guided_backprop,
    "deep_lift": _deep_lift,
    "occlusion_5": _occlusion(5),
    "occlusion_9": _occlusion(9),
    "lime": _lime,
}
METHODS = ("contributions", *INPUT_METHODS, "gradcam")
NEED_RELU = ("guided_backprop", "deep_lift")
# What captum says of models that DeepLift cannot read.
DEEP_LIFT_REFUSES = ("required for DeepLift", "maxpool modul", "is being modified inplace")
# methods that are defined at intermediate layers
BY_LAYER = ("contributions", "input_x_gradient", "gradcam")


def check_method(model: nn.Module, method: str) -> None:
    """Raises UserError if ``method`` says nothing about ``model``."""
    if method in NEED_RELU and not any(isinstance(module, nn.ReLU) for module in model.modules()):
        twin = "gradient" if method == "guided_backprop" else "input_x_gradient"
        raise UserError(
            f"method {method} changes the gradient of nn.ReLU modules and this model has none, so that it would only repeat {twin}; "
            f"leave it out, or take {twin}"
        )


def own_place(method: str, layers: Sequence[Layer]) -> Layer:
    """Where among ``explainable_layers`` a method makes its one map: before the pooling for
    GradCAM, else at the input.
    """
    return layers[0] if method == "gradcam" else layers[-1]


def places(method: str, layers: Sequence[Layer]) -> list[Layer]:
    """The ones of ``layers`` at which ``method`` is defined: GradCAM pools the gradients of a
    layer, and the input is none.
    """
    if method not in BY_LAYER:
        return [layer for layer in layers if layer.name is None]
    return [layer for layer in layers if layer.name is not None or method != "gradcam"]


def attribution_maps(
    method: str, model: nn.Module, images: Tensor, targets: Tensor, layers: Sequence[str | None]
) -> dict[str | None, Tensor]:
    """Signed maps of ``method`` for many classes, summed over channels.

    Args:
        method: one of METHODS.
        images: (B, 3, H, W), RGB in [0, 1].
        targets: (B, K) int64, the K classes explained in each image.
        layers: names of modules, None for the input encoding; see ``places``.

    Returns:
        By layer: maps (B, K, h, w) at the layer's own resolution.

    Raises:
        UserError: the method does not apply to this model.
    """
    if method == "contributions":
        return layer_contributions(model, images, targets, layers, sum_channels=True)
    check_method(model, method)
    encode, modules = parts(model).encode, dict(model.named_modules())
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        explanation_mode(model, fixed_weights=False),
        warnings.catch_warnings(),
    ):
        # it announces hooks that it removes again
        warnings.filterwarnings("ignore", module="captum")
        net = Encoded(model)
        encoded, black, targets = (
            encode(images).detach().clone(),
            encode(torch.zeros_like(images)).detach(),
            targets.clone(),
        )
        maps: dict[str | None, Tensor] = {}
        for layer in layers:
            if layer is None:
                maps[layer] = _at_input(method, net, encoded, black, targets).sum(2)
            else:
                maps[layer] = _at_layer(method, net, modules[layer], encoded, targets).sum(2)
    return maps


def _at_input(method: str, net: Encoded, encoded: Tensor, black: Tensor, targets: Tensor) -> Tensor:
    try:
        return INPUT_METHODS[method](net, encoded, black, targets)
    except (AssertionError, RuntimeError) as error:
        if method != "deep_lift" or not any(words in str(error) for words in DEEP_LIFT_REFUSES):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"method deep_lift cannot read this model ({reason}); leave it out"
        ) from error


def _at_layer(
    method: str, net: Encoded, module: nn.Module, encoded: Tensor, targets: Tensor
) -> Tensor:
    """(B, K, C, h, w) of a method of BY_LAYER at the output of ``module``; C is 1 for GradCAM."""
    from captum.attr import LayerGradCam, LayerGradientXActivation

    if method == "gradcam":
        return _each_class(
            lambda target: LayerGradCam(net, module).attribute(
                encoded, target, relu_attributions=True
            ),
            targets,
        )
    return _each_class(
        lambda target: LayerGradientXActivation(net, module).attribute(encoded, target), targets
    )


def at_input_size(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps (B, K, h, w) brought to the size of the images by nearest up-sampling."""
    return F.interpolate(maps, size=(height, width), mode="nearest")
