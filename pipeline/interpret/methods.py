"""Attribution methods under one signature: the network's own contributions, and post-hoc methods.

A method is a function and its entry in the table at the end of this file.

Conventions of Böhle, Fritz, Schiele, arXiv 2109.13004, and its official code: every method
attributes to what the network reads (for CoDA networks the six-channel encoding), keeps signs, and
is summed over channels to one map. Integrated gradients takes 20 steps from black; GradCAM has a
ReLU and sits at the layer before the pooling; occlusion blanks windows of 5 or 9 pixels, 2 pixels
apart, in all channels. LIME is in ``lime``. Post-hoc methods see the network as it is, dynamic
weights included, and not in explanation mode.

captum is imported by the methods that need it: the network's own contributions do not.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.errors import UserError
from pipeline.interpret.contributions import layer_contributions
from pipeline.interpret.layers import Layer
from pipeline.interpret.lime import lime
from pipeline.interpret.network import Encoded, explanation_mode, parts

INTEGRATION_STEPS = 20
OCCLUSION_STRIDE = 2
# Images of one forward pass where a method varies each image many times.
IMAGES_AT_ONCE = 64
# What captum says of models that DeepLift cannot read.
DEEP_LIFT_REFUSES = ("required for DeepLift", "maxpool modul", "is being modified inplace")

Maps = dict[str | None, Tensor]


@dataclass(frozen=True)
class Method:
    """An attribution method."""

    name: str
    """The name that recipes use."""
    maps: Callable[[nn.Module, Tensor, Tensor, Sequence[str | None]], Maps]
    """(model, images, targets, layers) to maps by layer, as :func:`attribution_maps`."""
    at_input: bool = True
    """Whether it is defined at the input encoding, which is then the place of its one map.

    Otherwise its own place is the layer before the pooling.
    """
    at_layers: bool = False
    """Whether it is defined at the outputs of layers."""
    without_relu: str | None = None
    """The method that it only repeats where the model has no ``nn.ReLU`` modules.

    None for a method that does not depend on them.
    """


@dataclass(frozen=True)
class Question:
    """What a post-hoc method is asked."""

    net: Encoded
    """The model from its encoding on."""
    encoded: Tensor
    """Encoded images, (B, C, H, W)."""
    black: Tensor
    """Encoded black images, (B, C, H, W)."""
    targets: Tensor
    """(B, K) int64, the K classes explained in each image."""
    at: nn.Module | None
    """The module whose output is explained, None for the input encoding."""

    def each_class(self, attribute: Callable[[Tensor], Tensor]) -> Tensor:
        """Stack ``attribute`` of one class (B,) per image, (B, C, h, w): (B, K, C, h, w)."""
        return torch.stack([attribute(target).detach() for target in self.targets.unbind(1)], dim=1)


def _own_contributions(
    model: nn.Module, images: Tensor, targets: Tensor, layers: Sequence[str | None]
) -> Maps:
    return layer_contributions(model, images, targets, layers, sum_channels=True)


def _post_hoc(
    attribute: Callable[[Question], Tensor],
) -> Callable[[nn.Module, Tensor, Tensor, Sequence[str | None]], Maps]:
    """Make a method of a function that answers a question by terms (B, K, C, h, w)."""

    def maps(
        model: nn.Module, images: Tensor, targets: Tensor, layers: Sequence[str | None]
    ) -> Maps:
        encode, modules = parts(model).encode, dict(model.named_modules())
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            explanation_mode(model, fixed_weights=False),
            warnings.catch_warnings(),
        ):
            # captum announces hooks that it removes again.
            warnings.filterwarnings("ignore", module="captum")
            net, encoded = Encoded(model), encode(images).detach().clone()
            black = encode(torch.zeros_like(images)).detach()
            found: Maps = {}
            for layer in layers:
                at = None if layer is None else modules[layer]
                question = Question(net, encoded, black, targets.clone(), at)
                found[layer] = attribute(question).sum(2)
        return found

    return maps


def _gradient(question: Question) -> Tensor:
    from captum.attr import Saliency

    method = Saliency(question.net)
    return question.each_class(lambda target: method.attribute(question.encoded, target, abs=False))


def _input_x_gradient(question: Question) -> Tensor:
    from captum.attr import InputXGradient, LayerGradientXActivation

    method = (
        InputXGradient(question.net)
        if question.at is None
        else LayerGradientXActivation(question.net, question.at)
    )
    return question.each_class(lambda target: method.attribute(question.encoded, target))


def _integrated_gradients(question: Question) -> Tensor:
    from captum.attr import IntegratedGradients

    method, encoded = IntegratedGradients(question.net), question.encoded
    size = max(IMAGES_AT_ONCE, len(encoded))
    return question.each_class(
        lambda target: method.attribute(
            encoded, question.black, target, n_steps=INTEGRATION_STEPS, internal_batch_size=size
        )
    )


def _guided_backprop(question: Question) -> Tensor:
    from captum.attr import GuidedBackprop

    return question.each_class(
        lambda target: GuidedBackprop(question.net).attribute(question.encoded, target)
    )


def _deep_lift(question: Question) -> Tensor:
    from captum.attr import DeepLift

    try:
        return question.each_class(
            lambda target: DeepLift(question.net).attribute(
                question.encoded, question.black, target
            )
        )
    except (AssertionError, RuntimeError) as error:
        if not any(words in str(error) for words in DEEP_LIFT_REFUSES):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"method deep_lift cannot read this model ({reason}); leave it out"
        ) from error


def _occlusion(window: int) -> Callable[[Question], Tensor]:
    def attribute(question: Question) -> Tensor:
        """Attribute to all classes from the same forward passes.

        captum takes a function with several outputs per image.
        """
        from captum.attr import Occlusion

        net, encoded, targets = question.net, question.encoded, question.targets
        channels = encoded.shape[1]
        terms: Tensor = Occlusion(lambda images, classes: net(images).gather(1, classes)).attribute(
            encoded,
            (channels, window, window),
            (channels, OCCLUSION_STRIDE, OCCLUSION_STRIDE),
            baselines=0,
            additional_forward_args=(targets,),
            perturbations_per_eval=max(1, IMAGES_AT_ONCE // len(encoded)),
        )
        return terms.view(*targets.shape, *encoded.shape[1:])  # (B * K, C, H, W) -> (B, K, C, H, W)

    return attribute


def _lime(question: Question) -> Tensor:
    return lime(question.net, question.encoded, question.targets, IMAGES_AT_ONCE)


def _gradcam(question: Question) -> Tensor:
    from captum.attr import LayerGradCam

    method = LayerGradCam(question.net, question.at)
    return question.each_class(
        lambda target: method.attribute(question.encoded, target, relu_attributions=True)
    )  # (B, K, 1, h, w)


METHODS_BY_NAME = {
    method.name: method
    for method in (
        Method("contributions", _own_contributions, at_layers=True),
        Method("gradient", _post_hoc(_gradient)),
        Method("input_x_gradient", _post_hoc(_input_x_gradient), at_layers=True),
        Method("integrated_gradients", _post_hoc(_integrated_gradients)),
        Method("guided_backprop", _post_hoc(_guided_backprop), without_relu="gradient"),
        Method("deep_lift", _post_hoc(_deep_lift), without_relu="input_x_gradient"),
        Method("occlusion_5", _post_hoc(_occlusion(5))),
        Method("occlusion_9", _post_hoc(_occlusion(9))),
        Method("lime", _post_hoc(_lime)),
        Method("gradcam", _post_hoc(_gradcam), at_input=False, at_layers=True),
    )
}
METHODS = tuple(METHODS_BY_NAME)
BY_LAYER = tuple(method.name for method in METHODS_BY_NAME.values() if method.at_layers)


def check_method(model: nn.Module, method: str) -> None:
    """Raise UserError if ``method`` says nothing about ``model``."""
    twin = METHODS_BY_NAME[method].without_relu
    if twin and not any(isinstance(module, nn.ReLU) for module in model.modules()):
        raise UserError(
            f"method {method} changes the gradient of nn.ReLU modules and this model has none, "
            f"so that it would only repeat {twin}; leave it out, or take {twin}"
        )


def own_place(method: str, layers: Sequence[Layer]) -> Layer:
    """Find where among ``explainable_layers`` a method makes its one map."""
    return layers[-1] if METHODS_BY_NAME[method].at_input else layers[0]


def places(method: str, layers: Sequence[Layer]) -> list[Layer]:
    """Select those of ``layers`` at which ``method`` is defined."""
    entry = METHODS_BY_NAME[method]
    return [
        layer for layer in layers if (entry.at_input if layer.name is None else entry.at_layers)
    ]


def attribution_maps(
    method: str, model: nn.Module, images: Tensor, targets: Tensor, layers: Sequence[str | None]
) -> Maps:
    """Compute signed maps of ``method`` for many classes, summed over channels.

    Args:
        method: one of METHODS.
        model: any classifier.
        images: (B, 3, H, W), RGB in [0, 1].
        targets: (B, K) int64, the K classes explained in each image.
        layers: names of modules, None for the input encoding; see ``places``.

    Returns:
        By layer: maps (B, K, h, w) at the layer's own resolution.

    Raises:
        UserError: the method does not apply to this model.
    """
    check_method(model, method)
    return METHODS_BY_NAME[method].maps(model, images, targets, layers)


def at_input_size(maps: Tensor, height: int, width: int) -> Tensor:
    """Bring maps (B, K, h, w) to the size of the images by nearest up-sampling."""
    return interpolate(maps, size=(height, width), mode="nearest")
