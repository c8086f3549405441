"""Processes, sharding and what TorchRec's embedding modules look like."""
