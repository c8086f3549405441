"""Scores of embedding columns, and plans under a budget."""

from sseds_rec import _fbgemm

_fbgemm.check()  # before anything imports TorchRec
