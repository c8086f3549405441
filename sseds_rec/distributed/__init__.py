"""Processes, sharding and what TorchRec's embedding modules look like."""

from sseds_rec import _fbgemm

_fbgemm.check()  # before anything imports TorchRec
