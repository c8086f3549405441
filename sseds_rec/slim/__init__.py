"""From a plan to slim tables: models and checkpoints."""
