"""Checkpoints on disk, converted without the model they are of."""
