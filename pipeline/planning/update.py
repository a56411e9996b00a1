"""Matrix products in the update of an optimiser."""

from collections.abc import Iterator

from torch import nn

from pipeline.planning.dry_run import Operation
from pipeline.recipe.optimisers import OPTIMISERS


def update_products(model: nn.Module, optimizer: str) -> Iterator[Operation]:
    """Yield the products of an update in bf16: the steps of Newton and Schulz on every matrix.

    Muon has five of them (Jordan et al., 2024), the usual optimisers none.
    """
    steps = OPTIMISERS[optimizer].newton_schulz_steps
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    for matrix in matrices:
        short, long = sorted((matrix.shape[0], matrix.numel() // matrix.shape[0]))
        products = ((short, long, short), (short, short, short), (short, short, long))
        for rows, inner, columns in products * steps:
            written = 2 * rows * columns
            yield Operation(
                "product",
                backward=False,
                multiply_adds=rows * inner * columns,
                bytes=2 * (rows * inner + inner * columns) + written,
                written=written,
                fresh=False,
                shape=(rows, inner, columns),
            )
