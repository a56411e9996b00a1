"""Published peaks of GPUs, and the time of an operation on one.

The numbers are those of the vendors' data sheets: dense matrix products (without sparsity), one
direction of the links. Nothing here was measured on a GPU.
"""

from dataclasses import dataclass

from pipeline.planning.dry_run import Kind, Operation


@dataclass(frozen=True)
class GPU:
    """Published peaks per device. Rates in operations (2 per multiply-add) or bytes per second."""

    name: str
    """As people know it."""
    bf16: float | None
    """Matrix units, bf16 operands and fp32 sums. None: it has none for bf16."""
    tf32: float
    """Matrix units, fp32 operands rounded to TF32; plain fp32 where there are none."""
    fp32: float
    """All other units."""
    bandwidth: float
    """Of its memory."""
    memory: float
    """Size of its memory in bytes."""
    link: float
    """To its neighbours in the node."""
    network: float
    """Of its share of the node's network; an assumption, as sites differ."""
    source: str
    """Where the numbers are published."""

    def rate(self, kind: Kind, bf16: bool) -> float:
        """Peak of the units that do an operation of ``kind``."""
        if kind in ("convolution", "product", "dau"):
            return self.bf16 if bf16 and self.bf16 else self.tf32
        return self.fp32


H100 = "NVIDIA H100 Tensor Core GPU data sheet"
A100 = "NVIDIA A100 Tensor Core GPU data sheet"
GPUS = {
    "h200": GPU(
        "H200 SXM",
        989e12,
        494.5e12,
        67e12,
        4.8e12,
        141e9,
        450e9,
        50e9,
        "NVIDIA H200 Tensor Core GPU data sheet",
    ),
    "h100": GPU("H100 SXM", 989e12, 494.5e12, 67e12, 3.35e12, 80e9, 450e9, 50e9, H100),
    "h100-pcie": GPU("H100 PCIe", 756e12, 378e12, 51e12, 2.0e12, 80e9, 64e9, 25e9, H100),
    "a100": GPU("A100 SXM 80 GB", 312e12, 156e12, 19.5e12, 2.039e12, 80e9, 300e9, 25e9, A100),
    "a100-40": GPU("A100 SXM 40 GB", 312e12, 156e12, 19.5e12, 1.555e12, 40e9, 300e9, 25e9, A100),
    "l40s": GPU(
        "L40S", 362e12, 183e12, 91.6e12, 864e9, 48e9, 32e9, 12.5e9, "NVIDIA L40S data sheet"
    ),
    "v100": GPU(
        "V100 SXM2 32 GB",
        None,
        15.7e12,
        15.7e12,
        900e9,
        32e9,
        150e9,
        12.5e9,
        "NVIDIA V100 Tensor Core GPU data sheet",
    ),
    "rtx4090": GPU(
        "GeForce RTX 4090",
        165.2e12,
        82.6e12,
        82.6e12,
        1008e9,
        24e9,
        32e9,
        3.125e9,
        "NVIDIA Ada GPU architecture white paper",
    ),
}
# Shares of the peaks that are reached. With these, ResNet-50 takes 13.6 minutes to train on 8 A100
# by ffcv-imagenet's 16-epoch schedule (160 to 192 pixels), for which its authors report 14.9 with
# evaluations. That one number chose the shares of convolutions and memory; the others are
# assumptions.
ATTAINABLE = {"convolution": 0.3, "product": 0.4, "dau": 0.25}
ATTAINABLE_BANDWIDTH = 0.5
# Seconds of an operation that does next to nothing.
LAUNCH = 5e-6


def gpu_seconds(operation: Operation, gpu: GPU, bf16: bool) -> tuple[float, str]:
    """Time ``operation`` by the roofline model (Williams et al., CACM 2009).

    Returns:
        The longer of computing and moving the operands, and which of the two it is: "compute" or
        "memory".
    """
    rate = gpu.rate(operation.kind, bf16) * ATTAINABLE.get(operation.kind, 1.0)
    compute = 2 * operation.multiply_adds / rate
    memory = operation.bytes / (gpu.bandwidth * ATTAINABLE_BANDWIDTH)
    return max(compute, memory, LAUNCH), "compute" if compute >= max(memory, LAUNCH) else "memory"
