"""Memory and time of a training step on this machine's processor."""

from collections.abc import Sequence

from torch import nn

from pipeline.planning.cpu_profile import CPUProfile
from pipeline.planning.dry_run import trace
from pipeline.planning.update import update_products
from pipeline.recipe.optimisers import OPTIMISERS


def cpu_step(
    model: nn.Module,
    input_size: Sequence[int],
    images: int,
    profile: CPUProfile,
    optimizer: str = "adamw",
) -> tuple[float, float]:
    """Predict the seconds and the peak bytes of a training step.

    Args:
        model: a network on the meta device.
        input_size: (C, H, W) of its input.
        images: number of images of the step.
        profile: what the processor can do.
        optimizer: name in ``OPTIMISERS``.
    """
    optimiser = OPTIMISERS[optimizer]
    work = trace(model, input_size, images, fused=False)
    parameters = list(model.parameters())
    operations = (*work.operations, *update_products(model, optimizer))
    seconds = sum(profile.seconds(operation) for operation in operations)
    passes = optimiser.update_passes
    for parameter in parameters:
        size = 4 * parameter.numel()
        seconds += passes * size / profile.at("elementwise in place", size)
        seconds += passes / 2 * profile.start
    # Weights, gradients and the optimiser's state.
    numbers = 2 + optimiser.state_numbers
    kept = 4 * numbers * sum(parameter.numel() for parameter in parameters)
    return seconds, kept + work.peak_bytes
