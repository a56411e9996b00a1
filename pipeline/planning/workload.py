"""The work that a recipe asks for, on whatever machine: images, resolutions, model."""

from functools import cached_property

import torch
from torch import nn

from pipeline.data.sources import find_source
from pipeline.errors import UserError
from pipeline.models.create import build_model
from pipeline.planning.cost import cost
from pipeline.recipe.schedules import training_size
from pipeline.recipe.schema import Recipe

# Classes of a source whose number of classes is not known.
DEFAULT_CLASSES = 1000
# Bytes per pixel of a JPEG: the mean of 400 photographs of ImageNet.
JPEG_BYTES = 0.55
# Longer by shorter side of a stored photograph.
ASPECT = 1.33
# Pixels of JPEGs that a thread decodes in a second, measured on one core of an AMD EPYC.
DECODED_PIXELS = 140e6


class Workload:
    """The images, resolutions and model of a recipe.

    Args:
        recipe: the recipe.
        images: number of training images. None: that of the recipe's source.

    Raises:
        UserError: the number of images is not known.
    """

    def __init__(self, recipe: Recipe, images: int | None = None):
        self.source = find_source(recipe.data.source)
        if images is None and self.source.images is None:
            raise UserError(
                f"data.source {recipe.data.source} may hold any number of images: "
                "say how many with --images"
            )
        self.recipe = recipe
        self.images = images or self.source.images or 0
        self.classes = self.source.classes or DEFAULT_CLASSES
        epochs = recipe.training.epochs
        self.sizes = [training_size(recipe.data, epoch, epochs) for epoch in range(epochs)]

    def build(self) -> nn.Module:
        """Build the model on the meta device.

        Raises:
            UserError: the model cannot be built.
        """
        with torch.device("meta"):
            return build_model(self.recipe.model, self.classes, fresh=False)

    @property
    def largest_size(self) -> int:
        """Side in pixels of the images of the epochs with the highest resolution."""
        return max(self.sizes)

    @cached_property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(parameter.numel() for parameter in self.build().parameters())

    def multiply_adds(self, size: int) -> int:
        """Multiply-adds of a forward pass of one image with a side of ``size`` pixels."""
        return cost(self.build(), (3, size, size)).multiply_adds

    @property
    def stored_pixels(self) -> float:
        """Pixels of a stored training image, in the mean."""
        data = self.recipe.data
        if self.source.fixed_size:
            return float(data.image_size**2)
        longer = data.max_resolution
        shorter = longer / ASPECT if longer else data.image_size * 256 / 224
        return shorter * shorter * ASPECT

    @property
    def stored_bytes(self) -> float:
        """Bytes of a stored training image, in the mean."""
        return self.stored_pixels * (JPEG_BYTES if self.recipe.data.write_mode == "jpg" else 3)

    @property
    def decoding_seconds(self) -> float:
        """Time in which the recipe's threads decode one image."""
        if self.recipe.data.write_mode != "jpg":
            return 0.0
        return self.stored_pixels / (DECODED_PIXELS * self.recipe.data.workers)
