"""The recipe `criteo`: the Criteo click logs, Kaggle's and the terabyte's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from typing_extensions import Unpack

from sseds_rec.data.prepare import PrepareOptions, prepare_source
from sseds_rec.data.schema import Schema
from sseds_rec.data.sources import Files
from sseds_rec.data.splits import random_or_time
from sseds_rec.data.table import with_tables
from sseds_rec.data.transforms import FieldSpec, numeric_transform

NUMERIC = [f"I{number}" for number in range(1, 14)]
CATEGORICAL = [f"C{number}" for number in range(1, 27)]


def prepare_criteo(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    numeric_as: Literal["log2_bucket", "dense"] = "log2_bucket",
    hashed: Mapping[str, int] | None = None,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    split_by: Literal["random", "time"] = "random",
    min_count: int = 10,
    seed: int = 0,
    **options: Unpack[PrepareOptions],
) -> Schema:
    """Prepares files of the Criteo Display Advertising Challenge or the Criteo Terabyte Click Logs.

    They are tab-separated without a header: the label, 13 integers (I1..I13) and 26 hashed categories (C1..C26), any of
    which but the label may be empty. Rows are in the order of time, so that `split_by="time"` divides by row.

    Args:
        inputs: .txt, .tsv or .csv files, plain or gzip, in the order of time; or files without a suffix, as the terabyte's
            `day_0`.
        output: Folder to make.
        numeric_as: Log² buckets (the paper, 4.1.1), or one dense float each (DLRM's way).
        hashed: See `prepare_table`, which explains the other arguments too.
        split: Fractions of train, validation and test; the paper's are 8:1:1.
        split_by: `random`, or `time`: the first rows train, the last ones test.
        min_count: Values seen less often in the train split share one id.
        seed: Of the split and of the stored order of the train rows.
        options: See `PrepareOptions`.

    Raises:
        UserError: Bad input; the line names the file and the row. Nothing is left in `output`.
    """
    transform = numeric_transform(numeric_as)
    fields = [
        *(FieldSpec(name, "numeric", transform, min_count=min_count) for name in NUMERIC),
        *(FieldSpec(name, min_count=min_count) for name in CATEGORICAL),
    ]
    return prepare_source(
        Files(inputs, ["click", *NUMERIC, *CATEGORICAL], quoted=False, delimiter="\t"),
        output,
        label="click",
        fields=with_tables(fields, hashed or {}, {}),
        splits=random_or_time(split_by, "order", split, seed, "Criteo"),
        origin={"recipe": "criteo", "inputs": [str(path) for path in inputs]},
        **options,
    )
