"""The flights month by month: every row in its window, and ids that grow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from sseds_rec.data.flights import prepare_flight_windows
from sseds_rec.data.prepare import load_vocabulary
from sseds_rec.data.schema import Schema
from sseds_rec.data.sources import Frame
from sseds_rec.data.transforms import FieldSpec
from sseds_rec.data.windows import prepare_windows
from sseds_rec.errors import UserError
from sseds_rec.online.windows import Windows
from tests.command import Command


@pytest.fixture(scope="module")
def months(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flights") / "months"
    prepare_flight_windows(folder, "month", seed=1, min_count=3)
    return folder


def test_every_flight_is_in_the_window_of_its_month(months: Path) -> None:
    names = sorted(path.name for path in months.iterdir() if path.is_dir())
    assert names == [f"2013-{month:02d}-01" for month in range(1, 13)]
    total = late = 0
    for number, name in enumerate(names, start=1):
        schema = Schema.load(months / name)
        assert [split.rows > 0 for split in schema.splits.values()] == [True, False, False]
        rows = pl.concat([pl.read_parquet(months / name / file) for file in schema.splits["train"].files])
        field = next(field for field in schema.fields if field.name == "month")
        assert set(load_vocabulary(months / name, field).decode(rows["month"])) == {str(number)}
        total, late = total + len(rows), late + int(rows["label"].sum())
        assert schema.source.get("vocabulary") == (f"../{names[number - 2]}" if number > 1 else None)
    assert (total, late) == (327_346, 77_630)


def test_ids_grow_from_window_to_window(months: Path) -> None:
    windows = Windows(str(months))
    windows.check_ids()
    planes = [window.table_rows["tailnum"] for window in windows]
    assert planes == sorted(planes) and planes[-1] > planes[0] + 500
    assert windows.schema.sparse_fields == windows[11].dataset.schema.sparse_fields


def test_earlier_windows_are_replaced_only_when_asked(tmp_path: Path) -> None:
    def prepare(output: Path, labels: str, overwrite: bool = False) -> None:
        rows = pl.DataFrame({"late": list(labels), "plane": ["a"] * len(labels)})
        fields, source = [FieldSpec("plane", min_count=1)], Frame(rows, "rows")
        options = {"label": "late", "fields": fields, "origin": {}, "overwrite": overwrite}
        prepare_windows([("1", source), ("2", source)], output, by="day", **options)

    prepare(tmp_path / "days", "01")
    with pytest.raises(UserError, match="holds a prepared set already"):
        prepare(tmp_path / "days", "011")
    with pytest.raises(UserError, match="the label 'late' is '2'"):
        prepare(tmp_path / "days", "012", overwrite=True)
    assert Windows(str(tmp_path / "days"))[1].rows == 2
    prepare(tmp_path / "days", "011", overwrite=True)
    assert Windows(str(tmp_path / "days"))[1].rows == 3
    (tmp_path / "sets" / "flights").mkdir(parents=True)
    (tmp_path / "sets" / "flights" / "schema.json").touch()
    with pytest.raises(UserError, match="exists and holds other files"):
        prepare(tmp_path / "sets", "01", overwrite=True)


def test_windows_take_no_split(sseds: Callable[..., Command], tmp_path: Path) -> None:
    done = sseds("prepare", "flights", "--windows", "week", "--split", "1,0,0", "--output", tmp_path / "weeks")
    assert done.code == 2 and "leave out --split and --split-by" in done.err and not list(tmp_path.iterdir())
