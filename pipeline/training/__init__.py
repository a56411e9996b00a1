"""A training run: set-up, loop, engine, checkpoints, and what happens when it is stopped."""
