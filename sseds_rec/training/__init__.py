"""Training, evaluation and checkpoints of click models."""

from sseds_rec import _fbgemm

_fbgemm.check()  # before anything imports TorchRec
