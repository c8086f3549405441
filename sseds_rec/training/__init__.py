"""Training, evaluation and checkpoints of click models."""
