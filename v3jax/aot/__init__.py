"""Compiles the training step for hardware that is not here, and reads what it would do there."""
