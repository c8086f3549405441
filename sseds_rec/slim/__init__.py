"""From a plan to slim tables: models and checkpoints."""

from sseds_rec import _fbgemm

_fbgemm.check()  # before anything imports TorchRec
