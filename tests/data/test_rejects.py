"""Rows that cannot be read: refused with file and row, or counted and listed; written + rejected = read."""

import csv

import numpy as np
import polars as pl
import pytest

from sseds_rec.data import chunk, delimited
from sseds_rec.data.schema import SPLITS
from sseds_rec.data.table import prepare_table
from sseds_rec.errors import UserError

FAULTS = {  # row number -> what it is, and why it is refused
    7: (b"7,3", "has 2 cells instead of 4"),
    8: (b"8,3,a,1,9", "has 5 cells instead of 4"),
    31: (b"31,many,a,1", "numeric column 'price' holds 'many', not a finite number"),
    32: (b"32,3,a,perhaps", "the label 'click' is 'perhaps'; it must be 0 or 1, or the value that counts as 1 must be given as"
         " positive"),
    33: (b"33,3,a,", "the label 'click' is empty"),
    60: (b"60,3,\xff\xfe,1", "column 'city' is not UTF-8 text"),
    101: (b"101", "has 1 cells instead of 4"),
}  # fmt: skip


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """A file of 100 rows below its header, seven of them faulty, the last row too."""
    monkeypatch.setattr(chunk, "CHUNK_ROWS", 10)
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 300)
    rows = [
        FAULTS[row][0] if row in FAULTS else f"{row},{row % 5},c{row % 3},{row % 2}".encode() for row in range(2, 102)
    ]
    file = tmp_path / "faulty.csv"
    file.write_bytes(b"id,price,city,click\n" + b"\n".join(rows) + b"\n")
    return file


def prepare(file, **options):
    return prepare_table(
        [file],
        file.parent / "out",
        label="click",
        categorical=["id", "city"],
        numeric=["price"],
        min_count=1,
        **options,
    )


def test_the_first_faulty_row_is_refused_and_nothing_is_left(faulty, tmp_path):
    with pytest.raises(UserError, match=r"faulty\.csv, row 7: has 2 cells instead of 4"):
        prepare(faulty)
    assert [path.name for path in tmp_path.iterdir()] == ["faulty.csv"]


@pytest.mark.parametrize("split_by", ["random", "order", "time:id"])
def test_skipped_rows_are_listed_and_all_others_written(faulty, tmp_path, split_by):
    schema = prepare(faulty, on_error="skip", split_by=split_by)
    with open(tmp_path / "out" / "rejected.csv", newline="") as stream:
        listed = [(row["file"], int(row["row"]), row["reason"]) for row in csv.DictReader(stream)]
    assert listed == [(str(faulty), row, reason) for row, (_, reason) in FAULTS.items()]
    assert schema.source["rejected"] == len(FAULTS)
    assert schema.source["written"] + schema.source["rejected"] == schema.source["rows"] == 100

    vocabulary = pl.read_parquet(tmp_path / "out" / "vocabulary/id.parquet")
    frames = [pl.read_parquet(tmp_path / "out" / file) for split in SPLITS for file in schema.splits[split].files]
    assert sum(frame.height for frame in frames) == schema.source["written"]
    train = pl.concat(pl.read_parquet(tmp_path / "out" / file) for file in schema.splits["train"].files)
    ids = dict(vocabulary.select("id", "value").iter_rows())
    for row, label in zip((int(ids[id_]) for id_ in train["id"]), train["label"], strict=True):
        assert row not in FAULTS and label == row % 2  # the cells of a row have stayed together


def test_a_set_without_faults_lists_none(tmp_path):
    (tmp_path / "good.csv").write_text("id,price,city,click\n" + "".join(f"{i},1,a,{i % 2}\n" for i in range(50)))
    schema = prepare(tmp_path / "good.csv", on_error="skip")
    assert schema.source["rejected"] == 0 and not (tmp_path / "out" / "rejected.csv").exists()


def test_what_a_file_of_many_chunks_holds_does_not_depend_on_the_chunks(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    frame = pl.DataFrame({"id": random.integers(0, 50, 3000), "tags": ["|".join("abc"[: n % 4]) for n in range(3000)]})
    frame.with_columns(click=pl.Series(random.integers(0, 2, 3000))).write_csv(tmp_path / "a.csv")
    found = []
    for rows, block in ((1 << 17, 1 << 22), (100, 1000), (7, 64)):
        monkeypatch.setattr(chunk, "CHUNK_ROWS", rows)
        monkeypatch.setattr(delimited, "BLOCK_BYTES", block)
        out = tmp_path / f"out{rows}"
        schema = prepare_table([tmp_path / "a.csv"], out, label="click", categorical=["id"], sequence=["tags"])
        found.append([pl.read_parquet(out / file) for split in SPLITS for file in schema.splits[split].files])
    assert all(a.equals(b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_an_unclosed_quote_never_swallows_rows(tmp_path):
    rows = [f"{row},c{row % 3},{row % 2}" for row in range(2, 102)]
    rows[49] = '51,"c0,1'
    rows[80] = '82,"c1",0'
    (tmp_path / "a.csv").write_text("\n".join(["id,city,click", *rows]) + "\n")
    for on_error in ("refuse", "skip"):  # which rows are lost cannot be told, so that they cannot be skipped either
        with pytest.raises(
            UserError, match=r"a\.csv, row 51: (column 'city' goes on over several lines|has \d+ cells)"
        ):
            prepare_table(
                [tmp_path / "a.csv"], tmp_path / "out", label="click", categorical=["city"], on_error=on_error
            )


def test_one_cell_that_is_no_text_does_not_change_how_others_are_read(tmp_path):
    rows = [b"%d, NA ,%d" % (row, row % 2) for row in range(100)]
    rows[40] = b"40,\xff,0"
    (tmp_path / "a.csv").write_bytes(b"\n".join([b"id,city,click", *rows]))
    options = {"label": "click", "categorical": ["city", "id"], "missing": ["NA"], "on_error": "skip"}
    schema = prepare_table([tmp_path / "a.csv"], tmp_path / "out", **options, split=(1, 0, 0))
    assert schema.source["rejected"] == 1 and schema.fields[0].counts.empty == 99


@pytest.mark.parametrize("split_by", ["order", "time:id"])
def test_splits_divide_the_rows_that_are_read(tmp_path, split_by):
    rows = [f"{row:04},{row % 2 if row < 800 else 'none'}" for row in range(1000)]
    (tmp_path / "a.csv").write_text("\n".join(["id,click", *rows]))
    options = {"label": "click", "categorical": ["id"], "on_error": "skip", "split_by": split_by}
    schema = prepare_table([tmp_path / "a.csv"], tmp_path / "out", **options)
    assert [schema.splits[split].rows for split in SPLITS] == [640, 80, 80] and schema.source["rejected"] == 200


def test_a_file_without_a_readable_row_says_why(tmp_path):
    (tmp_path / "a.csv").write_text("id,click\n1,maybe\n2,\n")
    with pytest.raises(
        UserError, match=r"a\.csv, row 2: the label 'click' is 'maybe'.*; none of the 2 rows can be read"
    ):
        prepare_table([tmp_path / "a.csv"], tmp_path / "out", label="click", categorical=["id"], on_error="skip")


def test_the_first_line_may_be_the_malformed_one_and_blank_lines_are_no_rows(tmp_path):
    rows = ["1,a", *(f"{row},b,{row % 2}" for row in range(2, 40))]
    (tmp_path / "a.csv").write_text("\n\n" + "\n".join(rows) + "\n\n")
    options = {"label": "click", "categorical": ["city"], "columns": ["id", "city", "click"]}
    schema = prepare_table([tmp_path / "a.csv"], tmp_path / "out", **options, on_error="skip", split=(1, 0, 0))
    assert schema.source["rejected"] == 1 and schema.splits["train"].rows == 38
    (tmp_path / "b.csv").write_text("\n\nid,city,click\n" + "\n".join(rows[1:5]) + "\nx,y\n")
    with pytest.raises(UserError, match=r"b\.csv, row 6: has 2 cells instead of 3"):
        prepare_table([tmp_path / "b.csv"], tmp_path / "b", label="click", categorical=["city"])
