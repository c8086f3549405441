"""Incremental training over windows of time, base and slim model side by side (the paper's Section 4.4)."""
