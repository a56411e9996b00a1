"""The one table of optimisers: what a recipe may name, how it is built, and what it costs.

A new optimiser that timm knows is one entry here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Optimiser:
    """An optimiser of ``timm.optim``."""

    timm_name: str
    """Its name for ``timm.optim.create_optimizer_v2``."""
    state_numbers: int
    """Numbers that it keeps for each parameter."""
    update_passes: float
    """Times that an update passes over a parameter on a processor, to read or write it."""
    newton_schulz_steps: int = 0
    """Steps of Newton and Schulz on every matrix in an update."""
    needs_whole_matrices: bool = False
    """Whether it computes with whole matrices, so that ZeRO must not shard its state."""


# The passes of muon were counted, not timed.
OPTIMISERS = {
    "adam": Optimiser("adam", state_numbers=2, update_passes=21),
    "adamw": Optimiser("adamw", state_numbers=2, update_passes=21),
    "sgd": Optimiser("sgd", state_numbers=1, update_passes=8),
    "muon": Optimiser(
        "muon",
        state_numbers=1,
        update_passes=12,
        newton_schulz_steps=5,
        needs_whole_matrices=True,
    ),
}
