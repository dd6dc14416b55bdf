"""State, the loop, checkpoints, metrics."""
