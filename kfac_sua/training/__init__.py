"""The training loop and what it needs: evaluation, learning rate, timing, checkpoints, seeds."""
