"""Memory and time of a recipe on a cluster of GPUs, from a dry run and rooflines."""

from collections.abc import Iterator

import torch

from pipeline.planning.cluster import Cluster, Step
from pipeline.planning.dry_run import Operation, Work, trace
from pipeline.planning.gpus import ATTAINABLE_BANDWIDTH, gpu_seconds
from pipeline.planning.update import update_products
from pipeline.planning.workload import Workload
from pipeline.recipe.optimisers import OPTIMISERS
from pipeline.recipe.schema import Recipe

# Bytes of a GPU that CUDA, cuDNN and NCCL keep for themselves.
CONTEXT = 1.5e9
# Share of the memory that can be used; the rest is lost to fragmentation.
USABLE = 0.92
# Times that an update reads or writes a number for each parameter, on a GPU.
UPDATE_PASSES = 7
# Times more with an average of the weights.
AVERAGE_PASSES = 3


class Plan:
    """The memory and time of a recipe on GPUs.

    Args:
        recipe: the recipe.
        images: number of training images. None: that of the recipe's source.

    Raises:
        UserError: the number of images is not known, or the model cannot be built.
    """

    def __init__(self, recipe: Recipe, images: int | None = None):
        self.recipe = recipe
        self.workload = Workload(recipe, images)
        self._bf16 = recipe.training.precision == "bf16"
        self._model = self.workload.build().to(torch.bfloat16 if self._bf16 else torch.float32)
        sizes = sorted(set(self.workload.sizes))
        self._works = {size: self._work(size) for size in sizes}

    def _work(self, size: int) -> tuple[Work, Work]:
        """The work on two and on four images with a side of ``size`` pixels."""
        two, four = (trace(self._model, (3, size, size), n, fused=True) for n in (2, 4))
        return two, four

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients, which are those of the parameters in fp32."""
        return 4 * self.workload.parameters

    def operations(self, size: int, images: int) -> Iterator[Operation]:
        """Yield the operations of a step over ``images`` images of ``size`` x ``size`` pixels.

        Everything that grows with the number of images does so in proportion.
        """
        for two, four in zip(*(work.operations for work in self._works[size]), strict=True):
            yield Operation(
                two.kind,
                two.backward,
                multiply_adds=_line(two.multiply_adds, four.multiply_adds, images),
                bytes=_line(two.bytes, four.bytes, images),
                written=_line(two.written, four.written, images),
                fresh=two.fresh,
                shape=two.shape,
            )

    def state_bytes(self, devices: int) -> dict[str, float]:
        """Bytes of a device that stay from step to step, by name, with ZeRO's shards."""
        training = self.recipe.training
        whole = 4.0 * self.workload.parameters
        numbers = OPTIMISERS[training.optimizer].state_numbers
        return {
            "weights": whole,
            "gradients": whole / (devices if training.zero_stage == 2 else 1),
            "optimiser": whole * numbers / (devices if training.zero_stage else 1),
            "weight average": whole if training.weight_average else 0.0,
            "reduction buffer": whole if devices > 1 else 0.0,
        }

    def activation_bytes(self, micro_batch: int) -> int:
        """Bytes at the peak of a pass over ``micro_batch`` images at the largest resolution."""
        two, four = self._works[self.workload.largest_size]
        return _line(two.peak_bytes, four.peak_bytes, micro_batch)

    def needed_bytes(self, devices: int, micro_batch: int) -> float:
        """Bytes of a device that a run needs in all."""
        states = sum(self.state_bytes(devices).values())
        return states + self.activation_bytes(micro_batch) + CONTEXT

    def largest_micro_batch(self, cluster: Cluster) -> int:
        """The largest micro-batch that fits into the memory; 0 if none does."""
        room = cluster.gpu.memory * USABLE - CONTEXT - sum(self.state_bytes(cluster.size).values())
        base = self.activation_bytes(0)
        slope = self.activation_bytes(1) - base
        return max(0, int((room - max(base, 0)) / slope))

    def step(self, size: int, cluster: Cluster, per_device: int, micro_batch: int) -> Step:
        """Time an update of ``per_device`` images on every GPU, at the resolution ``size``."""
        training = self.recipe.training
        seconds = {"compute": 0.0, "memory": 0.0}
        for operation in self.operations(size, micro_batch):
            time, bound = gpu_seconds(operation, cluster.gpu, self._bf16)
            seconds[bound] += time * per_device / micro_batch
        shards = cluster.size if training.zero_stage else 1
        passes = UPDATE_PASSES / shards + (AVERAGE_PASSES if training.weight_average else 0)
        touched = 4 * self.workload.parameters * passes
        seconds["memory"] += touched / (cluster.gpu.bandwidth * ATTAINABLE_BANDWIDTH)
        for operation in update_products(self._model, training.optimizer):
            time, bound = gpu_seconds(operation, cluster.gpu, bf16=True)
            seconds[bound] += time
        return Step(
            compute=seconds["compute"],
            memory=seconds["memory"],
            network=cluster.reduction_seconds(self.gradient_bytes),
            data=per_device * self.workload.decoding_seconds,
        )

    def epoch_seconds(self, cluster: Cluster, per_device: int, micro_batch: int) -> list[float]:
        """Seconds of every epoch."""
        updates = self.workload.images // (per_device * cluster.size)
        by_size = {
            size: self.step(size, cluster, per_device, micro_batch).seconds * updates
            for size in self._works
        }
        return [by_size[size] for size in self.workload.sizes]


def _line(two: int, four: int, images: int) -> int:
    """The value at ``images`` of the straight line through the values at 2 and 4."""
    return int(two + (four - two) / 2 * (images - 2))
