"""What a run costs before anyone pays for it: memory, time, data and network of a recipe on a
cluster, from a dry run and rooflines.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.models.create import build_model
from pipeline.planning.cost import cost
from pipeline.planning.cpu_profile import CPUProfile
from pipeline.planning.dry_run import Operation, Work, trace
from pipeline.planning.gpus import ATTAINABLE, ATTAINABLE_BANDWIDTH, GPU, gpu_seconds
from pipeline.recipe.optimisers import OPTIMISERS
from pipeline.recipe.schedules import training_size
from pipeline.recipe.schema import Recipe

# training images and classes of the sources whose size is known without looking
DATA_SETS = {
    "digits": (1437, 10),
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "tinyimagenet": (100_000, 200),
    "imagenet": (1_281_167, 1000),
    # at most: 1,300 a class
    "imagenet100": (130_000, 100),
}
# per pixel; mean of 400 photographs of ImageNet
JPEG_BYTES = 0.55
# longer by shorter side of a stored photograph
ASPECT = 1.33
# of JPEGs per second and thread; measured on one core of an AMD EPYC
DECODED_PIXELS = 140e6
# bytes of a GPU that CUDA, cuDNN and NCCL keep for themselves
CONTEXT = 1.5e9
# of the memory, for fragmentation
USABLE = 0.92
# of a reduction of nothing, per doubling of the number of nodes
MESSAGE_SECONDS = 20e-6
ASSUMPTIONS = f"""assumptions:
- a step is a dry run of the model, operation by operation; each takes the longer of computing and moving its operands (roofline);
- of the published peaks, convolutions reach {ATTAINABLE["convolution"]:.0%}, products {ATTAINABLE["product"]:.0%}, DAU kernels \
{ATTAINABLE["dau"]:.0%}, memory {ATTAINABLE_BANDWIDTH:.0%}: chosen to meet one published training (docs/plan.md), not measured;
- fp32 runs on TF32 units where there are some; bf16 halves activations, not parameters, gradients and optimiser;
- gradients are reduced in fp32 after the backward pass, by rings over the node's links and then over its network; nothing overlaps;
- images: {JPEG_BYTES} bytes a pixel as JPEG, decoded at {DECODED_PIXELS / 1e6:.0f} million pixels a second and thread, beside training;
- evaluations, checkpoints, start-up and requeueing are left out."""


@dataclass(frozen=True)
class Cluster:
    """``nodes`` machines with ``per_node`` processes, one on each device."""

    nodes: int
    per_node: int
    gpu: GPU

    @property
    def size(self) -> int:
        return self.nodes * self.per_node

    def reduction_seconds(self, gradient_bytes: float) -> float:
        """Time to sum ``gradient_bytes`` over all devices."""
        inside = 2 * (self.per_node - 1) / self.per_node * gradient_bytes / self.gpu.link
        between = (
            2 * (self.nodes - 1) / self.nodes * gradient_bytes / (self.per_node * self.gpu.network)
        )
        return max(inside, between) + (self.nodes + self.per_node > 2) * MESSAGE_SECONDS * max(
            1, (self.size - 1).bit_length()
        )


@dataclass(frozen=True)
class Step:
    """One update at one resolution, on one device; seconds."""

    compute: float
    """Of operations bound by computing."""
    memory: float
    """Of operations bound by memory, and of the optimiser."""
    network: float
    data: float
    """To decode the images of the update with the recipe's threads."""

    @property
    def seconds(self) -> float:
        return max(self.compute + self.memory + self.network, self.data)

    @property
    def bound(self) -> str:
        """What takes longest."""
        if self.data > self.compute + self.memory + self.network:
            return "data"
        parts = {"compute": self.compute, "memory traffic": self.memory, "network": self.network}
        return max(parts, key=lambda name: parts[name])


class Plan:
    """``recipe`` on a kind of GPU.

    Raises:
        UserError: the number of images is not known, the model cannot be built, or the batch cannot
            be divided.
    """

    def __init__(self, recipe: Recipe, images: int | None = None):
        self.recipe = recipe
        known = DATA_SETS.get(recipe.data.source)
        if images is None and known is None:
            raise UserError(
                f"data.source {recipe.data.source} may hold any number of images: say how many with --images"
            )
        self.images = images or known[0]  # type: ignore[index]
        self.classes = known[1] if known else 1000
        self.bf16 = recipe.training.precision == "bf16"
        epochs = recipe.training.epochs
        self.sizes = [training_size(recipe.data, epoch, epochs) for epoch in range(epochs)]
        self._model = self.build().to(torch.bfloat16 if self.bf16 else torch.float32)
        self._works = {size: self._work(size) for size in sorted(set(self.sizes))}

    def build(self) -> nn.Module:
        """The model, on the meta device."""
        with torch.device("meta"):
            return build_model(self.recipe.model, self.classes, fresh=False)

    def _work(self, size: int) -> tuple[Work, Work]:
        return tuple(trace(self._model, (3, size, size), images, fused=True) for images in (2, 4))  # type: ignore[return-value]

    @cached_property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())

    def multiply_adds(self, size: int) -> int:
        """Of a forward pass of one image."""
        return cost(self.build(), (3, size, size)).multiply_adds

    def operations(self, size: int, images: int) -> Iterator[Operation]:
        """Of a step over ``images``: everything that grows does so in proportion."""
        for two, four in zip(*(work.operations for work in self._works[size]), strict=True):
            grown = {
                key: _line(getattr(two, key), getattr(four, key), images)
                for key in ("multiply_adds", "bytes", "written")
            }
            yield Operation(two.kind, two.backward, **grown, fresh=two.fresh, shape=two.shape)

    def state_bytes(self, size: int) -> dict[str, float]:
        """Bytes per device of everything that stays from step to step, with ZeRO's shards on
        ``size`` devices.
        """
        training = self.recipe.training
        whole = 4.0 * self.parameters
        return {
            "weights": whole,
            "gradients": whole / (size if training.zero_stage == 2 else 1),
            "optimiser": whole
            * OPTIMISERS[training.optimizer].state_numbers
            / (size if training.zero_stage else 1),
            "weight average": whole if training.weight_average else 0.0,
            "reduction buffer": whole if size > 1 else 0.0,
        }

    def activation_bytes(self, micro_batch: int) -> float:
        """At their peak, at the largest resolution."""
        two, four = self._works[max(self._works)]
        return _line(two.peak_bytes, four.peak_bytes, micro_batch)

    def largest_micro_batch(self, cluster: Cluster) -> int:
        """That fits; 0 if none does."""
        room = cluster.gpu.memory * USABLE - CONTEXT - sum(self.state_bytes(cluster.size).values())
        base, slope = self.activation_bytes(0), self.activation_bytes(1) - self.activation_bytes(0)
        return max(0, int((room - max(base, 0)) / slope))

    def stored_image(self) -> tuple[float, float]:
        """Bytes and pixels of a stored training image."""
        data = self.recipe.data
        if data.source in ("digits", "cifar10", "cifar100", "tinyimagenet"):
            pixels = float(data.image_size**2)
        else:
            longer = data.max_resolution
            shorter = longer / ASPECT if longer else data.image_size * 256 / 224
            pixels = shorter * shorter * ASPECT
        return pixels * (JPEG_BYTES if data.write_mode == "jpg" else 3), pixels

    def step(self, size: int, cluster: Cluster, per_device: int, micro_batch: int) -> Step:
        """An update of ``per_device`` images on every device, at resolution ``size``."""
        seconds = {"compute": 0.0, "memory": 0.0}
        for operation in self.operations(size, micro_batch):
            time, bound = gpu_seconds(operation, cluster.gpu, self.bf16)
            seconds[bound] += time * per_device / micro_batch
        shards = cluster.size if self.recipe.training.zero_stage else 1
        touched = (
            4 * self.parameters * (7 / shards + (3 if self.recipe.training.weight_average else 0))
        )
        seconds["memory"] += touched / (cluster.gpu.bandwidth * ATTAINABLE_BANDWIDTH)
        for operation in update_products(self._model, self.recipe.training.optimizer):
            time, bound = gpu_seconds(operation, cluster.gpu, bf16=True)
            seconds[bound] += time
        _, pixels = self.stored_image()
        decoding = (
            pixels / (DECODED_PIXELS * self.recipe.data.workers)
            if self.recipe.data.write_mode == "jpg"
            else 0.0
        )
        return Step(
            seconds["compute"],
            seconds["memory"],
            cluster.reduction_seconds(4 * self.parameters),
            per_device * decoding,
        )

    def epoch_seconds(self, cluster: Cluster, per_device: int, micro_batch: int) -> list[float]:
        """Of every epoch."""
        updates = self.images // (per_device * cluster.size)
        by_size = {
            size: self.step(size, cluster, per_device, micro_batch).seconds * updates
            for size in self._works
        }
        return [by_size[size] for size in self.sizes]

    def report(self, cluster: Cluster) -> str:
        """Everything, as text."""
        micro, accumulation = self.recipe.micro_batch(cluster.size)
        size, gpu = max(self._works), cluster.gpu
        per_device = micro * accumulation
        step = self.step(size, cluster, per_device, micro)
        epochs = self.epoch_seconds(cluster, per_device, micro)
        states, activations = self.state_bytes(cluster.size), self.activation_bytes(micro)
        needed, largest = (
            sum(states.values()) + activations + CONTEXT,
            self.largest_micro_batch(cluster),
        )
        stored, _ = self.stored_image()
        rate = per_device * cluster.size / step.seconds
        total = sum(epochs)
        sizes = f"{min(self.sizes)}² to {size}²" if len(self._works) > 1 else f"{size}²"
        lines = [
            f"{self.recipe.name} on {cluster.nodes} x {cluster.per_node} {gpu.name} ({gpu.source}); nothing here was measured on a GPU",
            "",
            f"model       {self.recipe.model.name}: {self.parameters / 1e6:.2f} M parameters, "
            f"{self.multiply_adds(size) / 1e9:.3g} G multiply-adds forward at {size}², {self.recipe.training.precision}",
            f"data        {self.images:,} images at {sizes}, about {self.images * stored / 1e9:.3g} GB; "
            f"{rate * stored / cluster.nodes / 1e6:,.0f} MB/s per node, {rate * stored / 1e6:,.0f} MB/s in all",
            f"memory      {needed / 1e9:.1f} of {gpu.memory / 1e9:.0f} GB per GPU with {micro} images: "
            + ", ".join(
                f"{name} {value / 1e9:.2f}"
                for name, value in {"activations": activations, **states}.items()
                if value
            ),
            f"            {'fits' if micro <= largest else 'DOES NOT FIT'}; largest micro-batch that fits: {largest}"
            + (
                ""
                if micro <= largest
                else f"; say training.micro_batch_size={_divisor(per_device, largest)}"
                if largest
                else ""
            ),
            f"step        {step.seconds * 1e3:.1f} ms for {per_device * cluster.size} images ({rate:,.0f} images/s) at {size}²: "
            f"compute {step.compute * 1e3:.1f}, memory traffic {step.memory * 1e3:.1f}, network {step.network * 1e3:.1f}; "
            f"decoding {step.data * 1e3:.1f} beside it; bound by {step.bound}",
            f"network     {4 * self.parameters / 1e6:.0f} MB of gradients per GPU and step",
            f"time        {sum(epochs) / len(epochs) / 60:.1f} min an epoch, {total / 3600:.2f} h for {len(epochs)} epochs, "
            f"{total / 3600 * cluster.size:,.1f} GPU-hours",
            "",
            self.weak_scaling(cluster, per_device, micro),
            "",
            ASSUMPTIONS,
        ]
        return "\n".join(lines)

    def weak_scaling(self, cluster: Cluster, per_device: int, micro: int) -> str:
        """Markdown table: more nodes, each GPU with the same batch."""
        size = max(self._works)
        alone = self.step(size, Cluster(1, 1, cluster.gpu), per_device, micro).seconds
        rows = [
            "| GPUs | global batch | ms a step | efficiency | images/s | min an epoch | read, GB/s |",
            "|---|---|---|---|---|---|---|",
        ]
        stored, _ = self.stored_image()
        for nodes in (1, 4, 16, 64, 256, 512):
            wide = Cluster(nodes, cluster.per_node, cluster.gpu)
            step = self.step(size, wide, per_device, micro)
            rate = wide.size * per_device / step.seconds
            cells = [
                f"{wide.size:,}",
                f"{wide.size * per_device:,}",
                f"{step.seconds * 1e3:.1f}",
                f"{alone / step.seconds:.2f}",
            ]
            cells += [
                f"{rate:,.0f}",
                f"{self.images / rate / 60:.2f}",
                f"{rate * stored / 1e9:.2f}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
        return "\n".join(rows)


def cpu_report(recipe: Recipe, profile: CPUProfile, images: int | None = None) -> str:
    """The time and memory of ``recipe`` on this machine, in one process, as text."""
    plan = Plan(recipe, images)
    micro, accumulation = recipe.micro_batch(1)
    updates = plan.images // recipe.training.global_batch_size
    steps = {
        size: cpu_step(plan.build(), (3, size, size), micro, profile, recipe.training.optimizer)
        for size in set(plan.sizes)
    }
    total = sum(steps[size][0] * accumulation * updates for size in plan.sizes)
    seconds, peak = steps[max(steps)]
    return "\n".join(
        [
            f"{recipe.name} on this machine: {profile.about}",
            f"model       {recipe.model.name}: {plan.parameters / 1e6:.2f} M parameters, "
            f"{plan.multiply_adds(max(steps)) / 1e9:.3g} G multiply-adds forward at {max(steps)}²",
            f"memory      {peak / 1e9:.2f} GB for {micro} images, beside what the process needs without a model",
            f"step        {seconds * accumulation:.2f} s for {micro * accumulation} images ({micro / seconds:,.0f} images/s)",
            f"time        {total / len(plan.sizes) / 60:.1f} min an epoch, {total / 3600:.1f} h for {len(plan.sizes)} epochs, "
            "without loading, evaluation and checkpoints",
        ]
    )


def cpu_step(
    model: nn.Module,
    input_size: Sequence[int],
    images: int,
    profile: CPUProfile,
    optimizer: str = "adamw",
) -> tuple[float, float]:
    """Seconds and peak bytes of a training step of ``model``, which is on the meta device, on this
    machine's processor.
    """
    work = trace(model, input_size, images, fused=False)
    parameters = list(model.parameters())
    seconds = sum(
        profile.seconds(operation)
        for operation in (*work.operations, *update_products(model, optimizer))
    )
    for parameter in parameters:
        size = 4 * parameter.numel()
        passes = OPTIMISERS[optimizer].update_passes
        seconds += (
            passes * size / profile.at("elementwise in place", size) + passes / 2 * profile.start
        )
    states = 4 * sum(parameter.numel() for parameter in parameters) * (2 + OPTIMISERS[optimizer].state_numbers)
    return seconds, states + work.peak_bytes


def update_products(model: nn.Module, optimizer: str) -> Iterator[Operation]:
    """Products of an update in bf16: the steps of Newton and Schulz on every matrix.

    Muon has five of them (Jordan et al., 2024), the usual optimisers none.
    """
    steps = OPTIMISERS[optimizer].newton_schulz_steps
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    for matrix in matrices:
        short, long = sorted((matrix.shape[0], matrix.numel() // matrix.shape[0]))
        for rows, inner, columns in (
            (short, long, short),
            (short, short, short),
            (short, short, long),
        ) * steps:
            written = 2 * rows * columns
            moved = 2 * (rows * inner + inner * columns) + written
            yield Operation(
                "product",
                False,
                rows * inner * columns,
                moved,
                written,
                fresh=False,
                shape=(rows, inner, columns),
            )


def _line(two: float, four: float, images: int) -> Any:
    """At ``images``, on the straight line through the values at 2 and 4; whole where those are."""
    value = two + (four - two) / 2 * (images - 2)
    return int(value) if isinstance(two, int) else value


def _divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)
