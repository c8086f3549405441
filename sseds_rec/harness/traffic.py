"""How evenly the training rows share the rows of a table."""

from __future__ import annotations

import polars as pl

from sseds_rec.data.dataset import Dataset
from sseds_rec.files import join, open_file


def sharing_evenly(dataset: Dataset) -> dict[str, float]:
    """Field -> (Σ c)² / Σ c² of its vocabulary's counts c: the rows that would share the traffic evenly.

    Fields without a vocabulary (hashed, raw, or of another tool's set) have no counts, and are not in it.
    """
    found = {}
    for field in dataset.schema.sparse_fields:
        if field.vocabulary is not None:
            with open_file(join(dataset.path, field.vocabulary)) as file:
                counts = pl.read_parquet(file, columns=["count"])["count"].cast(pl.Float64)
            found[field.name] = float(counts.sum()) ** 2 / float((counts**2).sum())
    return found
