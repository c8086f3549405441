"""Criteo and Avazu: every row goes through, and all counts agree with plain Python's."""

import csv
import gzip
import math
import random
from collections import Counter
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from sseds_rec.data import chunk, delimited, parts
from sseds_rec.data.avazu import prepare_avazu
from sseds_rec.data.criteo import CATEGORICAL, NUMERIC, prepare_criteo
from sseds_rec.data.prepare import load_vocabulary
from sseds_rec.data.schema import SPLITS, Schema
from sseds_rec.errors import UserError

SAMPLE = Path(__file__).parents[2] / "../shared/data/criteo_15k.tsv.gz"
AVAZU = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)


def criteo_lines(rows: int) -> list[str]:
    """Rows as Criteo's: a label, 13 integers, 26 categories, any of which but the label may be empty."""
    draw = random.Random(0)

    def row() -> list[str]:
        numbers = [draw.choice(["", str(int(draw.lognormvariate(2, 2)) - 2)]) for _ in NUMERIC]
        words = [draw.choice(["", f"{int(draw.paretovariate(0.7)):08x}"]) for _ in CATEGORICAL]
        return [str(draw.randint(0, 1)), *numbers, *words]

    return ["\t".join(row()) for _ in range(rows)]


def decoded(folder: Path, schema: Schema) -> dict[str, pl.DataFrame]:
    """The values of each split; None for rare and empty ones."""
    found = {}
    for split in SPLITS:
        rows = pl.concat(pl.read_parquet(folder / file) for file in schema.splits[split].files)
        values = (load_vocabulary(folder, field).decode(rows[field.name]).alias(field.name) for field in schema.fields)
        found[split] = rows.select("label", *values)
    return found


def bucket(cell: str) -> int | None:
    """The paper's transform of a number (4.1.1)."""
    if not cell:
        return None
    number = int(cell)
    return math.floor(math.log(number) ** 2) if number > 2 else number


@pytest.mark.parametrize("name", ["generated", "the real sample"])
def test_criteo_counts_agree_with_an_independent_count(tmp_path, monkeypatch, name):
    monkeypatch.setattr(chunk, "CHUNK_ROWS", 700)
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 1 << 15)
    if name == "generated":
        lines, files = criteo_lines(2000), [tmp_path / "day_0", tmp_path / "day_1.txt.gz"]
        files[0].write_text("\n".join(lines[:1200]) + "\n")
        files[1].write_bytes(gzip.compress(("\n".join(lines[1200:]) + "\n").encode()))
    else:
        files = [SAMPLE]
        with gzip.open(SAMPLE, "rt") as stream:
            lines = stream.read().splitlines()
    schema = prepare_criteo(files, tmp_path / "out")

    assert [field.name for field in schema.fields] == NUMERIC + CATEGORICAL
    assert sum(split.rows for split in schema.splits.values()) == len(lines) == schema.source["rows"]
    assert [schema.splits[split].rows for split in SPLITS] == pytest.approx([0.8 * len(lines)] + [0.1 * len(lines)] * 2)
    records = [line.split("\t") for line in lines]
    assert sum(split.positives for split in schema.splits.values()) == sum(record[0] == "1" for record in records)

    values = decoded(tmp_path / "out", schema)
    for column, field in enumerate(schema.fields, start=1):
        read = bucket if field.name in NUMERIC else lambda cell: cell or None
        reference = Counter(read(record[column]) for record in records)
        table = load_vocabulary(tmp_path / "out", field).table[2:]
        in_train = dict(table.select("value", "count").iter_rows())
        assert in_train == Counter(values["train"][field.name].drop_nulls()) and all(c >= 10 for c in in_train.values())
        everywhere = Counter(value for split in SPLITS for value in values[split][field.name] if value is not None)
        assert everywhere == {value: reference[value] for value in everywhere}  # the same cells, and all of them
        for value, count in reference.items():  # a value that is not in the vocabulary cannot be frequent in train
            assert value is None or value in in_train or count - 9 <= schema.splits["validation"].rows * 2
        assert field.counts is not None
        seen = field.counts.empty + field.counts.rare + sum(in_train.values())
        assert seen == schema.splits["train"].rows
        assert sum(m.count for m in field.counts.magnitudes) == seen - field.counts.empty


def test_criteo_by_time_divides_in_the_order_of_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk, "CHUNK_ROWS", 64)
    monkeypatch.setattr(parts, "PART_ROWS", 100)
    lines = criteo_lines(500)
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    schema = prepare_criteo([tmp_path / "a.txt"], tmp_path / "out", split_by="time", min_count=1, numeric_as="dense")
    assert [schema.splits[split].rows for split in SPLITS] == [400, 50, 50]
    assert [len(schema.splits[split].files) for split in SPLITS] == [4, 1, 1]
    for split, expected in (("train", lines[:400]), ("validation", lines[400:450]), ("test", lines[450:])):
        rows = pl.concat(pl.read_parquet(tmp_path / "out" / file) for file in schema.splits[split].files)
        expected_sums = [
            sum(math.copysign(math.log1p(abs(int(cell))), int(cell)) for cell in line.split("\t")[1:14] if cell)
            for line in expected
        ]
        sums = rows.select(pl.sum_horizontal(NUMERIC)).to_series().to_list()
        if split == "train":  # shuffled, not one row lost
            assert sums != pytest.approx(expected_sums, abs=1e-4)
            sums, expected_sums = sorted(sums), sorted(expected_sums)
        assert sums == pytest.approx(expected_sums, abs=1e-4)


def test_avazu_splits_the_hour_and_drops_the_id(tmp_path):
    draw = random.Random(1)
    hours = [f"1410{21 + row // 300}{row // 12 % 24:02}" for row in range(3000)]
    file = tmp_path / "train.gz"  # as Kaggle calls it
    rows = [
        [str(10**18 + row), str(draw.randint(0, 1)), hour, *(f"{draw.randint(0, 30):x}" for _ in range(21))]
        for row, hour in enumerate(hours)
    ]
    with gzip.open(file, "wt", newline="") as stream:
        csv.writer(stream).writerows([AVAZU.split(","), *rows])
    schema = prepare_avazu([file], tmp_path / "out")

    # 22 columns of the paper's Table 1, one of them as two fields
    assert {field.name for field in schema.fields} == {*AVAZU.split(","), "hour_of_day", "weekday"} - {
        "id",
        "click",
        "hour",
    }
    assert len(schema.fields) == 23 and sum(split.rows for split in schema.splits.values()) == 3000
    both = pl.concat(decoded(tmp_path / "out", schema).values())
    times = [datetime.strptime(hour, "%y%m%d%H") for hour in hours]
    assert Counter(both["weekday"]) == Counter(time.strftime("%a") for time in times)
    assert Counter(both["hour_of_day"]) == Counter(f"{time.hour:02}" for time in times)
    for column in range(3, 24):
        assert Counter(both[AVAZU.split(",")[column]]) == Counter(row[column] for row in rows)

    by_time = prepare_avazu([file], tmp_path / "by_time", split_by="time")
    assert [by_time.splits[split].rows for split in SPLITS] == [2400, 300, 300]
    assert set(decoded(tmp_path / "by_time", by_time)["test"]["weekday"]) == {"Thu"}  # 30 October 2014


def test_avazu_refuses_an_hour_that_is_none(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text(f"{AVAZU}\n1,0,14102100{',a' * 21}\n2,0,14102177{',a' * 21}\n")
    with pytest.raises(UserError, match=r"train\.csv, row 3: column 'hour' holds '14102177', not a time as YYMMDDHH"):
        prepare_avazu([file], tmp_path / "out")
