"""New days for an old vocabulary, part windows, and sets in a remote store."""

from collections import Counter

import numpy as np
import polars as pl
import pytest

from sseds_rec.data import parts
from sseds_rec.data.loader import Loader
from sseds_rec.data.prepare import load_vocabulary
from sseds_rec.data.schema import SPLITS, Schema
from sseds_rec.data.table import prepare_table
from sseds_rec.errors import UserError
from tests.store import registered


def day(folder, number, cities, rows=400):
    """A day of clicks, in which cities are equally likely."""
    random = np.random.default_rng(number)
    frame = pl.DataFrame({"city": random.choice(cities, rows), "price": random.integers(1, 9, rows)})
    file = folder / f"day{number}.parquet"
    frame.with_columns(click=pl.Series(random.integers(0, 2, rows))).write_parquet(file)
    return file


def prepare(file, output, **options):
    return prepare_table([file], output, label="click", categorical=["city"], numeric=["price"], **options)


def decoded(folder, split="train"):
    schema = Schema.load(folder)
    rows = pl.concat(pl.read_parquet(folder / file) for file in schema.splits[split].files)
    return load_vocabulary(folder, schema.fields[0]).decode(rows["city"])


def test_new_days_are_encoded_with_the_old_ids(tmp_path):
    monday = day(tmp_path, 1, ["Oslo", "Rome", "Bonn"])
    tuesday = day(tmp_path, 2, ["Oslo", "Rome", "Lima"])
    old = prepare(monday, tmp_path / "monday")
    new = prepare(tuesday, tmp_path / "tuesday", vocabulary=tmp_path / "monday", split=(1, 0, 0))

    assert [new.splits[split].rows for split in SPLITS] == [400, 0, 0] and new.splits["test"].files == []
    assert [field.cardinality for field in new.fields] == [field.cardinality for field in old.fields]
    city = old.fields[0]
    tables = [load_vocabulary(tmp_path / name, city).table for name in ("monday", "tuesday")]
    assert tables[0].equals(tables[1])
    reference = Counter(pl.read_parquet(tuesday)["city"])
    assert Counter(decoded(tmp_path / "tuesday")) == {
        "Oslo": reference["Oslo"],
        "Rome": reference["Rome"],
        None: reference["Lima"],
    }
    batches = list(Loader(tmp_path / "tuesday", "train", 100))
    assert sum(len(batch.labels) for batch in batches) == 400

    held_out = prepare(tuesday, tmp_path / "tested", vocabulary=tmp_path / "monday", split=(0, 0, 1))
    assert held_out.splits["test"].rows == 400 and decoded(tmp_path / "tested", "test").len() == 400


def test_a_grown_vocabulary_only_appends(tmp_path):
    prepare(day(tmp_path, 1, ["Oslo", "Rome", "Bonn"]), tmp_path / "monday")
    tuesday = day(tmp_path, 2, ["Oslo", "Lima", "Cork"])
    grown = prepare(tuesday, tmp_path / "tuesday", vocabulary=tmp_path / "monday", grow=True, split=(1, 0, 0))
    before = load_vocabulary(tmp_path / "monday", grown.fields[0]).table
    after = load_vocabulary(tmp_path / "tuesday", grown.fields[0]).table
    assert after["value"][: before.height].to_list() == before["value"].to_list()
    assert set(after["value"][before.height :]) == {"Lima", "Cork"} and grown.fields[0].cardinality == before.height + 2
    reference = Counter(pl.read_parquet(tuesday)["city"])
    assert Counter(decoded(tmp_path / "tuesday")) == reference
    for value, count in after[2:].select("value", "count").iter_rows():
        earlier = before.filter(pl.col("value") == value)["count"].sum()
        assert count == reference[value] + earlier


def test_a_vocabulary_of_other_fields_is_refused(tmp_path):
    monday = day(tmp_path, 1, ["Oslo", "Rome"])
    prepare(monday, tmp_path / "monday")
    options = {"label": "click", "vocabulary": tmp_path / "monday"}
    with pytest.raises(
        UserError, match=r"monday: field 'price' is numeric, log2_bucket, \d+ rows there, not categorical"
    ):
        prepare_table([monday], tmp_path / "out", categorical=["city", "price"], **options)
    with pytest.raises(
        UserError, match="field 'city' is categorical, vocabulary, 4 rows there, not categorical, hash, 9"
    ):
        prepare_table([monday], tmp_path / "out", categorical=["city"], hashed={"city": 9}, **options)
    day(tmp_path, 3, ["Oslo"]).rename(tmp_path / "c.parquet")
    pl.read_parquet(tmp_path / "c.parquet").rename({"city": "town"}).write_parquet(tmp_path / "c.parquet")
    with pytest.raises(UserError, match="monday: has no field 'town'"):
        prepare_table([tmp_path / "c.parquet"], tmp_path / "out", categorical=["town"], **options)


def test_train_rows_are_shuffled_within_windows_of_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_ROWS", 100)
    monkeypatch.setattr(parts, "OPEN_PARTS", 3)
    pl.DataFrame({"row": range(1000), "click": [0, 1] * 500}).write_parquet(tmp_path / "a.parquet")
    options = {"label": "click", "categorical": ["row"], "min_count": 1, "split_by": "order"}
    schema = prepare_table([tmp_path / "a.parquet"], tmp_path / "out", **options)
    vocabulary = load_vocabulary(tmp_path / "out", schema.fields[0])
    found = [
        [int(row) for row in vocabulary.decode(pl.read_parquet(tmp_path / "out" / file)["row"])]
        for file in schema.splits["train"].files
    ]
    assert len(found) == 8
    for first, last in ((0, 3), (3, 6), (6, 8)):  # the rows of a window, mixed over its parts and inside them
        window = [row for rows in found[first:last] for row in rows]
        assert sorted(window) == list(range(100 * first, 100 * last))
        assert all(60 < len(rows) < 140 for rows in found[first:last])
        assert all(max(rows) - min(rows) > 50 * (last - first) and rows != sorted(rows) for rows in found[first:last])
    validation = vocabulary.decode(pl.read_parquet(tmp_path / "out" / schema.splits["validation"].files[0])["row"])
    assert validation.null_count() == 100  # values that train never had


def test_a_remote_store_holds_input_output_and_vocabulary(tmp_path):
    (tmp_path / "store").mkdir()
    with registered(tmp_path / "store") as store:
        day(tmp_path / "store", 1, ["Oslo", "Rome"]).rename(tmp_path / "store" / "day1.parquet")
        pl.read_parquet(tmp_path / "store" / "day1.parquet").write_csv(tmp_path / "store" / "day2.csv")
        first = prepare("test://day1.parquet", "test://sets/one")
        assert store.written[-1] == "test://sets/one/schema.json"  # without it there is no set
        assert Schema.load("test://sets/one") == first
        second = prepare("test://day2.csv", "test://sets/two", vocabulary="test://sets/one")
        assert [field.cardinality for field in second.fields] == [field.cardinality for field in first.fields]
        rows = [(batch.sparse.values(), batch.labels) for batch in Loader("test://sets/two", "train", 64, shuffle=True)]
        assert sum(len(labels) for _, labels in rows) == 320
        with pytest.raises(UserError, match="test://sets/two: holds a prepared set already"):
            prepare("test://day2.csv", "test://sets/two")
        with pytest.raises(UserError, match="strange://a.csv: no such store is registered with iopath"):
            prepare("strange://a.csv", "test://sets/three")
        with pytest.raises(UserError, match="test://nowhere.csv: no such file"):
            prepare("test://nowhere.csv", "test://sets/three")
    local = prepare(tmp_path / "store" / "day2.csv", tmp_path / "local", vocabulary=tmp_path / "store" / "sets" / "one")
    assert local.fields == second.fields
    assert decoded(tmp_path / "local").equals(decoded(tmp_path / "store" / "sets" / "two"))
