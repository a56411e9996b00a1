"""Plans as text for people."""

from collections.abc import Iterator

from pipeline.planning.cluster import Cluster
from pipeline.planning.cpu_plan import cpu_step
from pipeline.planning.cpu_profile import CPUProfile
from pipeline.planning.gpus import ATTAINABLE, ATTAINABLE_BANDWIDTH
from pipeline.planning.plan import Plan
from pipeline.planning.workload import DECODED_PIXELS, JPEG_BYTES, Workload
from pipeline.recipe.schema import Recipe

# Numbers of nodes in the table of weak scaling.
SCALES = (1, 4, 16, 64, 256, 512)
ASSUMPTIONS = (
    "assumptions:",
    "- a step is a dry run of the model, operation by operation; "
    "each takes the longer of computing and moving its operands (roofline);",
    f"- of the published peaks, convolutions reach {ATTAINABLE['convolution']:.0%}, "
    f"products {ATTAINABLE['product']:.0%}, DAU kernels {ATTAINABLE['dau']:.0%}, "
    f"memory {ATTAINABLE_BANDWIDTH:.0%}: "
    "chosen to meet one published training (docs/plan.md), not measured;",
    "- fp32 runs on TF32 units where there are some; "
    "bf16 halves activations, not parameters, gradients and optimiser;",
    "- gradients are reduced in fp32 after the backward pass, "
    "by rings over the node's links and then over its network; nothing overlaps;",
    f"- images: {JPEG_BYTES} bytes a pixel as JPEG, "
    f"decoded at {DECODED_PIXELS / 1e6:.0f} million pixels a second and thread, beside training;",
    "- evaluations, checkpoints, start-up and requeueing are left out.",
)


def gpu_report(plan: Plan, cluster: Cluster) -> str:
    """Return all that ``plan`` says of a run on ``cluster``, and what it assumes.

    Raises:
        UserError: the batch cannot be divided among the processes.
    """
    micro, accumulation = plan.recipe.micro_batch(cluster.size)
    per_device = micro * accumulation
    lines = [
        f"{plan.recipe.name} on {cluster.nodes} x {cluster.per_node} {cluster.gpu.name} "
        f"({cluster.gpu.source}); nothing here was measured on a GPU",
        "",
        f"{_model(plan.workload)}, {plan.recipe.training.precision}",
        _data(plan, cluster, per_device, micro),
        *_memory(plan, cluster, per_device, micro),
        _step(plan, cluster, per_device, micro),
        f"network     {plan.gradient_bytes / 1e6:.0f} MB of gradients per GPU and step",
        _time(plan, cluster, per_device, micro),
        "",
        *_weak_scaling(plan, cluster, per_device, micro),
        "",
        *ASSUMPTIONS,
    ]
    return "\n".join(lines)


def cpu_report(recipe: Recipe, profile: CPUProfile, images: int | None = None) -> str:
    """Return the time and memory of ``recipe`` on this machine, in one process.

    Raises:
        UserError: the number of images is not known, the model cannot be built, or the batch
            cannot be divided.
    """
    workload = Workload(recipe, images)
    micro, accumulation = recipe.micro_batch(1)
    optimizer, updates = recipe.training.optimizer, workload.images // (micro * accumulation)
    steps = {
        size: cpu_step(workload.build(), (3, size, size), micro, profile, optimizer)
        for size in set(workload.sizes)
    }
    seconds, peak = steps[workload.largest_size]
    total = sum(steps[size][0] * accumulation * updates for size in workload.sizes)
    epochs = len(workload.sizes)
    lines = [
        f"{recipe.name} on this machine: {profile.about}",
        _model(workload),
        f"memory      {peak / 1e9:.2f} GB for {micro} images, "
        "beside what the process needs without a model",
        f"step        {seconds * accumulation:.2f} s for {micro * accumulation} images "
        f"({micro / seconds:,.0f} images/s)",
        f"time        {total / epochs / 60:.1f} min an epoch, {total / 3600:.1f} h "
        f"for {epochs} epochs, without loading, evaluation and checkpoints",
    ]
    return "\n".join(lines)


def _model(workload: Workload) -> str:
    size = workload.largest_size
    return (
        f"model       {workload.recipe.model.name}: {workload.parameters / 1e6:.2f} M parameters, "
        f"{workload.multiply_adds(size) / 1e9:.3g} G multiply-adds forward at {size}²"
    )


def _data(plan: Plan, cluster: Cluster, per_device: int, micro: int) -> str:
    workload = plan.workload
    smallest, largest = min(workload.sizes), workload.largest_size
    sizes = f"{smallest}² to {largest}²" if smallest < largest else f"{largest}²"
    step = plan.step(largest, cluster, per_device, micro)
    read = per_device * cluster.size / step.seconds * workload.stored_bytes
    return (
        f"data        {workload.images:,} images at {sizes}, "
        f"about {workload.images * workload.stored_bytes / 1e9:.3g} GB; "
        f"{read / cluster.nodes / 1e6:,.0f} MB/s per node, {read / 1e6:,.0f} MB/s in all"
    )


def _memory(plan: Plan, cluster: Cluster, per_device: int, micro: int) -> Iterator[str]:
    parts = {"activations": plan.activation_bytes(micro), **plan.state_bytes(cluster.size)}
    named = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items() if value)
    yield (
        f"memory      {plan.needed_bytes(cluster.size, micro) / 1e9:.1f} "
        f"of {cluster.gpu.memory / 1e9:.0f} GB per GPU with {micro} images: {named}"
    )
    largest = plan.largest_micro_batch(cluster)
    line = f"largest micro-batch that fits: {largest}"
    if micro <= largest:
        yield f"            fits; {line}"
        return
    if largest:
        line += f"; say training.micro_batch_size={_largest_divisor(per_device, largest)}"
    yield f"            DOES NOT FIT; {line}"


def _step(plan: Plan, cluster: Cluster, per_device: int, micro: int) -> str:
    size, images = plan.workload.largest_size, per_device * cluster.size
    step = plan.step(size, cluster, per_device, micro)
    return (
        f"step        {step.seconds * 1e3:.1f} ms for {images} images "
        f"({images / step.seconds:,.0f} images/s) at {size}²: "
        f"compute {step.compute * 1e3:.1f}, memory traffic {step.memory * 1e3:.1f}, "
        f"network {step.network * 1e3:.1f}; decoding {step.data * 1e3:.1f} beside it; "
        f"bound by {step.bound}"
    )


def _time(plan: Plan, cluster: Cluster, per_device: int, micro: int) -> str:
    epochs = plan.epoch_seconds(cluster, per_device, micro)
    hours = sum(epochs) / 3600
    return (
        f"time        {sum(epochs) / len(epochs) / 60:.1f} min an epoch, "
        f"{hours:.2f} h for {len(epochs)} epochs, {hours * cluster.size:,.1f} GPU-hours"
    )


def _weak_scaling(plan: Plan, cluster: Cluster, per_device: int, micro: int) -> Iterator[str]:
    """Lines of a Markdown table: more nodes, each GPU with the same batch."""
    workload, size = plan.workload, plan.workload.largest_size
    alone = plan.step(size, Cluster(1, 1, cluster.gpu), per_device, micro).seconds
    yield (
        "| GPUs | global batch | ms a step | efficiency | images/s | min an epoch | read, GB/s |"
    )
    yield "|---|---|---|---|---|---|---|"
    for nodes in SCALES:
        wide = Cluster(nodes, cluster.per_node, cluster.gpu)
        seconds = plan.step(size, wide, per_device, micro).seconds
        images = wide.size * per_device
        rate = images / seconds
        cells = [
            f"{wide.size:,}",
            f"{images:,}",
            f"{seconds * 1e3:.1f}",
            f"{alone / seconds:.2f}",
            f"{rate:,.0f}",
            f"{workload.images / rate / 60:.2f}",
            f"{rate * workload.stored_bytes / 1e9:.2f}",
        ]
        yield f"| {' | '.join(cells)} |"


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``."""
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)
