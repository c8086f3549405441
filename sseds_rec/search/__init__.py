"""Scores of embedding columns, and plans under a budget."""
