"""A cluster of GPUs, and a step of training on it."""

from dataclasses import dataclass

from pipeline.planning.gpus import GPU

# Seconds of a reduction of nothing, per doubling of the number of devices.
MESSAGE_SECONDS = 20e-6


@dataclass(frozen=True)
class Cluster:
    """Machines with GPUs, and one process on each GPU."""

    nodes: int
    """Number of machines."""
    per_node: int
    """GPUs of a machine."""
    gpu: GPU
    """Their kind."""

    @property
    def size(self) -> int:
        """Number of GPUs."""
        return self.nodes * self.per_node

    def reduction_seconds(self, gradient_bytes: float) -> float:
        """Time to sum ``gradient_bytes`` over all GPUs, by rings in the nodes and between them."""
        inside = 2 * (self.per_node - 1) / self.per_node * gradient_bytes / self.gpu.link
        share = 2 * (self.nodes - 1) / self.nodes
        between = share * gradient_bytes / (self.per_node * self.gpu.network)
        doublings = max(1, (self.size - 1).bit_length()) if self.size > 1 else 0
        return max(inside, between) + MESSAGE_SECONDS * doublings


@dataclass(frozen=True)
class Step:
    """Seconds of one update at one resolution, on every GPU."""

    compute: float
    """Of operations bound by computing."""
    memory: float
    """Of operations bound by memory, and of the optimiser."""
    network: float
    """To sum the gradients."""
    data: float
    """To decode the images of the update with the recipe's threads, beside all else."""

    @property
    def on_gpu(self) -> float:
        """Seconds of all that the GPU waits for."""
        return self.compute + self.memory + self.network

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return max(self.on_gpu, self.data)

    @property
    def bound(self) -> str:
        """What takes longest."""
        if self.data > self.on_gpu:
            return "data"
        parts = {"compute": self.compute, "memory traffic": self.memory, "network": self.network}
        return max(parts, key=lambda name: parts[name])
