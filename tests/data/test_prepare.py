"""`prepare_table`: what lands on disk, against the csv module, and every refusal."""

import csv
import gzip
import itertools
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sseds_rec.data import chunk, parts
from sseds_rec.data.prepare import load_vocabulary
from sseds_rec.data.schema import SPLITS, Schema
from sseds_rec.data.table import prepare_table
from sseds_rec.errors import UserError

CENSUS = Path(__file__).parents[2] / "../shared/data/census_income_99762.csv.gz"
CENSUS_COLUMNS = [f"c{number}" for number in range(1, 42)] + ["income"]


def rows_of(folder, schema, split):
    return pl.concat([pl.read_parquet(folder / file) for file in schema.splits[split].files])


def decoded(folder, schema, split):
    """Raw values of a split; rare and empty ones are null."""
    rows = rows_of(folder, schema, split)
    return rows.select(
        "label", *(load_vocabulary(folder, field).decode(rows[field.name]).alias(field.name) for field in schema.fields)
    )


@pytest.fixture
def clicks(tmp_path):
    """A table of 200 rows in CSV: id, city, price, tags, day, part, click."""
    file = tmp_path / "clicks.csv"
    generator = np.random.default_rng(0)
    with open(file, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", " city ", "price", "tags", "day", "part", "click"])
        for row in range(200):
            city = generator.choice(["Oslo", "Rome", "", f"village {row}"], p=[0.5, 0.3, 0.1, 0.1])
            tags = "|".join(generator.choice(["a", "b", "c"], generator.integers(0, 4)))
            part = ["train", "train", "val", "test"][row % 4]
            writer.writerow(
                [row, city, generator.choice(["", "3", "1000"]), tags, f"2024-01-{row // 10 + 1:02}", part, row % 3 % 2]
            )
    return file


@pytest.fixture
def prepare(tmp_path, clicks):
    """Prepares `clicks` into out/, with changes."""

    def run(**changes):
        options = {"label": "click", "categorical": ["id", "city"], "numeric": ["price"], "sequence": ["tags"]}
        options |= {"min_count": 5, "seed": 3, **changes}
        return prepare_table(options.pop("inputs", [clicks]), tmp_path / "out", **options)

    return run


def test_census_counts_agree_with_the_csv_module(tmp_path):
    with gzip.open(CENSUS, "rt") as stream:
        lines = list(itertools.islice(stream, 8000))
    file = tmp_path / "census.csv.gz"
    with gzip.open(file, "wt") as stream:
        stream.writelines(lines)
    records = [[cell.strip() for cell in record] for record in csv.reader(lines)]
    categorical = [name for number, name in enumerate(CENSUS_COLUMNS[:-1], start=1) if number != 25]
    schema = prepare_table(
        [file], tmp_path / "out", label="income", positive="50000+.", columns=CENSUS_COLUMNS, categorical=categorical
    )

    assert [schema.splits[split].rows for split in SPLITS] == [6400, 800, 800]
    assert sum(schema.splits[split].positives for split in SPLITS) == sum(r[-1] == "50000+." for r in records)
    whole = Counter()
    for split in SPLITS:
        frame = decoded(tmp_path / "out", schema, split)
        assert frame["label"].sum() == schema.splits[split].positives
        for name in categorical:
            whole.update((name, value) for value in frame[name] if value is not None)
    train = decoded(tmp_path / "out", schema, "train")
    for index, name in enumerate(CENSUS_COLUMNS[:-1]):
        if name not in categorical:
            continue
        reference = Counter(record[index] for record in records)
        vocabulary = load_vocabulary(tmp_path / "out", next(f for f in schema.fields if f.name == name)).table[2:]
        assert dict(vocabulary.select("value", "count").iter_rows()) == Counter(train[name].drop_nulls())
        assert all(count >= 10 for count in vocabulary["count"])
        for value in vocabulary["value"]:  # a frequent value keeps its id wherever it occurs
            assert whole[name, value] == reference[value]


def test_every_row_is_written_once_with_its_cells(prepare, clicks, tmp_path):
    schema = prepare(min_count=1, split=(0.5, 0.25, 0.25))
    assert [schema.splits[split].rows for split in SPLITS] == [100, 50, 50]
    with open(clicks) as stream:
        records = {record["id"]: record for record in csv.DictReader(stream)}
    train = decoded(tmp_path / "out", schema, "train")
    assert train["id"].n_unique() == 100
    order = [int(id_) for id_ in train["id"]]
    assert order != sorted(order)
    for id_, label, city, price, tags in train.select("id", "label", "city", "price", "tags").iter_rows():
        record = records[id_]
        assert label == int(record["click"])
        assert city == (record[" city "] or None)
        assert price == (math.floor(math.log(float(record["price"])) ** 2) if record["price"] else None)
        assert tags == [tag for tag in record["tags"].split("|") if tag]
    for split in ("validation", "test"):  # ids never seen in train share one id
        assert set(rows_of(tmp_path / "out", schema, split)["id"]) == {1}


def test_same_seed_same_files_other_seed_other_rows(clicks, tmp_path):
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        schema = prepare_table([clicks], tmp_path / name, label="click", categorical=["id"], min_count=1, seed=seed)
        contents.append(decoded(tmp_path / name, schema, "train")["id"].to_list())
    assert contents[0] == contents[1]
    assert set(contents[0]) != set(contents[2])


def test_formats_and_several_files_agree(clicks, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk, "CHUNK_ROWS", 17)
    monkeypatch.setattr(parts, "PART_ROWS", 30)
    frame = pl.read_csv(clicks).rename({" city ": "city"}).with_columns(pl.col("tags").str.split("|"))
    frame.write_parquet(tmp_path / "t.parquet")
    frame.select(pl.exclude("tags"), tags=pl.col("tags").list.join("|")).write_csv(tmp_path / "t.tsv", separator="\t")
    lines = clicks.read_text().splitlines(keepends=True)
    (tmp_path / "half1.csv").write_text("".join(lines[:100]))
    with gzip.open(tmp_path / "half2.csv.gz", "wt") as stream:
        stream.writelines([lines[0], *lines[100:]])

    found = []
    for inputs in (["t.parquet"], ["t.tsv"], ["clicks.csv"], ["half1.csv", "half2.csv.gz"]):
        out = tmp_path / f"out{len(found)}"
        options = {"label": "click", "categorical": ["city", "id"], "numeric": ["price"], "sequence": ["tags"]}
        schema = prepare_table([tmp_path / name for name in inputs], out, **options, min_count=5)
        sizes = [len(pl.read_parquet(out / file)) for file in schema.splits["train"].files]
        assert len(sizes) == 6 and sum(sizes) == 160 and max(sizes) < 60
        found.append([rows_of(out, schema, split) for split in SPLITS] + [schema.fields])
    for other in found[1:]:
        assert all(a.equals(b) for a, b in zip(found[0][:3], other[:3], strict=True)) and found[0][3] == other[3]


def test_split_by_time_and_by_column(prepare, clicks, tmp_path):
    schema = prepare(split_by="time:day", min_count=1, categorical=["day"], split=(0.72, 0.18, 0.1))
    # ten rows a day: the 144th is in day 15, which goes whole to validation
    assert [schema.splits[split].rows for split in SPLITS] == [140, 40, 20]
    assert set(decoded(tmp_path / "out", schema, "train")["day"]) == {f"2024-01-{day:02}" for day in range(1, 15)}
    schema = prepare(split_by="column:part", categorical=["part"], min_count=1, overwrite=True)
    assert [schema.splits[split].rows for split in SPLITS] == [100, 50, 50]
    assert set(decoded(tmp_path / "out", schema, "train")["part"]) == {"train"}


def test_cells_that_mean_empty(tmp_path):
    (tmp_path / "a.csv").write_text(
        "x,n,click\n" + "".join(f"{x},{n},{i % 2}\n" for i, (x, n) in enumerate(MISSING * 20))
    )
    options = {"label": "click", "categorical": ["x"], "numeric": ["n"], "min_count": 1, "split": (1, 0, 0)}
    schema = prepare_table([tmp_path / "a.csv"], tmp_path / "out", **options, missing=["NA", "?"])
    found = set(decoded(tmp_path / "out", schema, "train").select("x", "n").iter_rows())
    assert found == {("a", 1), (None, 2), (None, None), ("NAN", None), (None, 4)}  # floor(log(7.4)²) = 4
    assert [field.counts.empty for field in schema.fields] == [60, 40]


MISSING = [("a", 1), ("NA", 2), (" ?", "NA"), ("NAN", " NA "), ('""', 7.4)]


def test_dense_numbers_have_no_table(prepare, tmp_path):
    schema = prepare(numeric_as="dense")
    assert [field.name for field in schema.dense_fields] == ["price"]
    assert [field.name for field in schema.sparse_fields] == ["id", "city", "tags"]
    prices = set(rows_of(tmp_path / "out", schema, "train")["price"])
    assert sorted(prices) == pytest.approx([0, math.log(4), math.log(1001)])
    assert Schema.load(tmp_path / "out") == schema == Schema.load(tmp_path / "out" / "schema.json")


REFUSALS = [
    ({"inputs": ["nowhere.csv"]}, "nowhere.csv: no such file"),
    ({"categorical": ["id", "citi"]}, "clicks.csv: no column 'citi'; the nearest name is 'city'"),
    ({"label": "clik"}, "no column 'clik'; the nearest name is 'click'"),
    ({"categorical": ["id", "id"]}, "column 'id' is listed twice"),
    ({"categorical": ["id"], "numeric": ["id"]}, "column 'id' is listed twice"),
    ({"categorical": ["click"]}, "'click' is listed both as the label and as a field"),
    ({"label": "day"}, "clicks.csv, row 2: the label 'day' is '2024-01-01'; it must be 0 or 1"),
    ({"label": "price", "numeric": [], "positive": "3"}, "clicks.csv, row 2: the label 'price' is empty"),
    ({"positive": "yes"}, "no row has 'yes' in the label column 'click'"),
    ({"numeric": ["price", "day"]}, "clicks.csv, row 2: numeric column 'day' holds '2024-01-01'"),
    ({"split": (0.8, 0.1, 0.2)}, "split 0.8,0.1,0.2: sums to 1.1, not to 1"),
    ({"split": (1.1, -0.2, 0.1)}, "split 1.1,-0.2,0.1: give three fractions, for train"),
    ({"split": (0.5, 0.5)}, "give three fractions"),
    ({"split": (0.998, 0.001, 0.001)}, "leaves no validation row"),
    ({"split_by": "chance"}, "split-by 'chance': must be random, order, time:COLUMN or column:COLUMN"),
    ({"split_by": "time:when"}, "no column 'when'"),
    ({"split_by": "time:part"}, "clicks.csv, row 2: time column 'part' holds 'train'"),
    ({"split_by": "column:city"}, r"clicks.csv, row 2: split column 'city' .* must be train, validation or test"),
    ({"categorical": [], "sequence": [], "numeric_as": "dense"}, "no field has an embedding table"),
    ({"min_count": 0}, "min-count 0: must be at least 1"),
    ({"hashed": {"price": 100}}, "hash 'price': is no categorical or sequence field"),
    ({"hashed": {"city": 1}}, "hash city=1: a table has at least 2 rows"),
    ({"raw": {"city": 100}}, r"clicks.csv, row \d+: column 'city' holds '\w.*', not a 64-bit integer"),
    ({"raw": {"tags": 100}}, r"clicks.csv, row \d+: column 'tags' holds '.*', not 64-bit integers"),
    ({"hashed": {"id": 9}, "raw": {"id": 9}}, "field 'id' is listed both under hash and under raw"),
    ({"weights": {"city": "price"}}, "weights 'city': is no sequence field"),
    ({"weights": {"tags": "day"}}, r"row 2: column 'day' holds '2024-01-01', not one finite number for each element"),
    ({"grow": True}, "grow: name the prepared set"),
    ({"vocabulary": "nowhere"}, "nowhere.*no such file"),
    ({"split": (0, 0.5, 0.5)}, "no row is in the train split"),
    ({"columns": ["a", "b"]}, "clicks.csv, row 1: has 7 cells, but 2 column names were given"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_bad_input_is_one_line_and_leaves_nothing(prepare, tmp_path, changes, message):
    before = set(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message) as refused:
        prepare(**changes)
    assert "\n" not in str(refused.value)
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "x.csv: is empty"),
        ("a,click\n", "x.csv: has no rows"),
        ("a,a,click\n1,1,1\n", "two columns are called 'a'"),
        ("a,click\n1,1\n1,0,7\n", "x.csv, row 3: has 3 cells"),
        ("a,click\n1,1\n2,maybe\n", "x.csv, row 3: the label 'click' is 'maybe'"),
        (b"a,click\n\xff\xfe,1\n", "x.csv, row 2: column 'a' is not UTF-8 text"),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, message):
    file = tmp_path / "x.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as refused:
        prepare_table([file], tmp_path / "out", label="click", categorical=["a"])
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == ["x.csv"]


def test_a_bad_cell_in_a_later_chunk_and_file_has_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk, "CHUNK_ROWS", 10)
    (tmp_path / "a.csv").write_text("x,click\n" + "1,0\n" * 25)
    (tmp_path / "b.csv").write_text("x,click\n" + "1,1\n" * 22 + "many,1\n")
    with pytest.raises(UserError, match=r"b\.csv, row 24: numeric column 'x' holds 'many'"):
        prepare_table([tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "out", label="click", numeric=["x"])


def test_an_earlier_set_is_kept_unless_overwriting_succeeds(prepare, tmp_path):
    first = prepare()
    with pytest.raises(UserError, match="holds a prepared set already"):
        prepare()
    with pytest.raises(UserError, match="numeric column"):
        prepare(overwrite=True, numeric=["day"])
    assert Schema.load(tmp_path / "out") == first
    (tmp_path / ".out.tmp" / "train").mkdir(parents=True)  # what a killed run leaves
    second = prepare(overwrite=True, seed=4)
    assert Schema.load(tmp_path / "out") == second != first
    assert sorted(os.listdir(tmp_path)) == ["clicks.csv", "out"]


def test_a_folder_with_other_files_is_never_replaced(prepare, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and holds other files"):
        prepare(overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; make the data set with `sseds prepare`"),
        ("{", "not valid JSON"),
        ('{"version": 2}', "version is 2, this program reads version 1"),
        ('{"version": 1, "label": "x"}', "fields: Field required"),
    ],
)
def test_a_bad_schema_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "schema.json").write_text(content)
    with pytest.raises(UserError, match=message) as refused:
        Schema.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_columns_may_have_odd_names(tmp_path):
    frame = pl.DataFrame({name: ["a", "b", None, "a"] * 25 for name in ("count", "value", "id", "split")})
    frame.with_columns(click=pl.Series([0, 1] * 50)).write_csv(tmp_path / "a.csv")
    names = frame.columns
    schema = prepare_table([tmp_path / "a.csv"], tmp_path / "out", label="click", categorical=names, split=(1, 0, 0))
    train = decoded(tmp_path / "out", schema, "train")
    assert all(sorted(train[name].drop_nulls()) == ["a"] * 50 + ["b"] * 25 for name in names)
    frame.rename({"id": "^i.*$"}).with_columns(click=pl.Series([0, 1] * 50)).write_csv(tmp_path / "b.csv")
    with pytest.raises(UserError, match="cannot be read under this name; rename it"):
        prepare_table([tmp_path / "b.csv"], tmp_path / "b", label="click", categorical=["^i.*$"])


def test_times_of_several_files_are_compared_in_one_unit(tmp_path):
    for name, year, unit in (("late", 2020, "ms"), ("early", 2010, "us")):
        days = pl.datetime_range(pl.datetime(year, 1, 1), pl.datetime(year, 1, 31), "1d", time_unit=unit, eager=True)
        frame = pl.DataFrame({"when": days, "year": [year] * len(days), "click": [day % 2 for day in range(len(days))]})
        frame.write_parquet(tmp_path / f"{name}.parquet")
    files, options = (
        [tmp_path / "late.parquet", tmp_path / "early.parquet"],
        {"label": "click", "categorical": ["year"]},
    )
    schema = prepare_table(files, tmp_path / "out", **options, split_by="time:when", split=(0.5, 0.25, 0.25))
    assert set(decoded(tmp_path / "out", schema, "train")["year"]) == {"2010"}
    with pytest.raises(UserError, match="late.parquet: is named twice"):
        prepare_table([files[0], files[0]], tmp_path / "twice", **options)


def test_categories_of_a_parquet_file_are_text(tmp_path):
    city = pl.Series("city", [" Oslo", "", "Rome", "NA"] * 25, pl.Categorical())
    pl.DataFrame({"city": city, "click": [0, 1] * 50}).write_parquet(tmp_path / "a.parquet")
    options = {"label": "click", "categorical": ["city"], "missing": ["NA"], "split": (1, 0, 0)}
    schema = prepare_table([tmp_path / "a.parquet"], tmp_path / "out", **options)
    found = decoded(tmp_path / "out", schema, "train")["city"]
    assert sorted(found.drop_nulls()) == ["Oslo"] * 25 + ["Rome"] * 25 and schema.fields[0].counts.empty == 50


def test_two_runs_do_not_write_one_folder(prepare, tmp_path):
    with parts.new_folder(tmp_path / "out") as folder:
        with pytest.raises(UserError, match="out: another run is writing it"):
            prepare()
        (folder / "schema.json").write_text("first")
    assert (tmp_path / "out" / "schema.json").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == ["clicks.csv", "out"]
    with pytest.raises(UserError, match="holds a prepared set already"):
        prepare()
    assert sorted(os.listdir(tmp_path)) == ["clicks.csv", "out"]


def test_a_run_killed_while_it_replaced_a_set_has_not_lost_it(prepare, tmp_path):
    first = prepare()
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(UserError, match="holds a prepared set already"):
        prepare()
    assert Schema.load(tmp_path / "out") == first
