"""Numbers that several parts must agree on; imports nothing heavy."""

#: Share of kept columns that another draw of the batches must keep, for a plan to be called stable.
STABLE = 0.9

#: FBGEMM's table-batched kernels take widths that are multiples of this only, on CPU too.
KERNEL_MULTIPLE = 4

#: Columns of a table in a forecast, at most: far above what is trained.
WIDEST = 8192


def stored_dim(embedding_dim: int) -> int:
    """The width in columns at which FBGEMM can store `embedding_dim` columns."""
    return -(-embedding_dim // KERNEL_MULTIPLE) * KERNEL_MULTIPLE
