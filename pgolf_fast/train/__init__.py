"""The training loop, its step, meta-learning, checkpoints and metrics."""
