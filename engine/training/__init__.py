"""The training loop and what it needs: optimizer, settings, precision, checkpoints, checks against the reference."""
