"""A training run: the loop, its engine and optimiser, checkpoints, and what happens when it is stopped."""
