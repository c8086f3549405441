"""The recipe `avazu`: Kaggle's Avazu click-through rate data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
from typing_extensions import Unpack

from sseds_rec.data.cells import Reading
from sseds_rec.data.prepare import PrepareOptions, prepare_source
from sseds_rec.data.schema import Schema
from sseds_rec.data.sources import Files
from sseds_rec.data.splits import random_or_time
from sseds_rec.data.table import with_tables
from sseds_rec.data.transforms import FieldSpec

CATEGORICAL = (
    ["C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"]
    + ["device_id", "device_ip", "device_model", "device_type", "device_conn_type"]
    + [f"C{number}" for number in range(14, 22)]
)


@dataclass(frozen=True)
class TimeField(FieldSpec):
    """A part of the column `hour`, which is YYMMDDHH, by its strftime format."""

    part: str = ""

    @property
    def columns(self) -> Sequence[str]:
        """See `cells.Reader`."""
        return ["hour"]

    def reading(self, types: pl.Schema) -> Reading:
        """The part as text. See `cells.Reader`."""
        cells = pl.col("hour").cast(pl.String)
        time = pl.when(cells.str.contains(r"^\d{8}$")).then(cells + "00").str.to_datetime("%y%m%d%H%M", strict=False)
        return Reading(
            [pl.col(f"\0{self.name}").dt.strftime(self.part).alias(self.name)],
            [time.alias(f"\0{self.name}")],
            pl.col(f"\0{self.name}").is_null(),
            lambda row: f"column 'hour' holds {row['hour']!r}, not a time as YYMMDDHH",
        )


def prepare_avazu(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    hashed: Mapping[str, int] | None = None,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    split_by: Literal["random", "time"] = "random",
    min_count: int = 10,
    seed: int = 0,
    **options: Unpack[PrepareOptions],
) -> Schema:
    """Prepares `train.csv` (or `train.gz`) of Kaggle's Avazu competition: eleven days of clicks.

    Of its 24 columns, `id` is dropped, `click` is the label, and the 22 others are those of the paper's Table 1: 21 fields as
    they are, and `hour` (YYMMDDHH), which identifies one hour only and is useless on later days, as the two fields
    `hour_of_day` and `weekday`.

    Args:
        inputs: CSV files with the header, plain or gzip.
        output: Folder to make.
        hashed: See `prepare_table`, which explains the other arguments too.
        split: Fractions of train, validation and test; the paper's are 8:1:1.
        split_by: `random`, or `time`: the first hours train, the last ones test.
        min_count: Values seen less often in the train split share one id.
        seed: Of the split and of the stored order of the train rows.
        options: See `PrepareOptions`.

    Raises:
        UserError: Bad input; the line names the file and the row. Nothing is left in `output`.
    """
    fields = [
        TimeField("hour_of_day", min_count=min_count, part="%H"),
        TimeField("weekday", min_count=min_count, part="%a"),
        *(FieldSpec(name, min_count=min_count) for name in CATEGORICAL),
    ]
    return prepare_source(
        Files(inputs, quoted=False, delimiter=","),
        output,
        label="click",
        fields=with_tables(fields, hashed or {}, {}),
        splits=random_or_time(split_by, "time:hour", split, seed, "Avazu"),
        origin={"recipe": "avazu", "inputs": [str(path) for path in inputs]},
        **options,
    )
