"""Windows as they are read: what is known when a window is predicted, and what is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from sseds_rec.data.loader import Loader
from sseds_rec.errors import UserError
from sseds_rec.online.windows import Windows
from tests.data.sets import Row, rows_of
from tests.online.conftest import ROWS, WINDOWS, prepare


def _rows(dataset: object, split: str) -> Counter[Row]:
    return Counter(rows_of(Loader(dataset, split, 100, prefetch=0)))  # type: ignore[arg-type]


def test_a_window_is_predicted_as_the_vocabulary_before_it_encodes_it(
    logs: list[Path], windows: Path, tmp_path: Path
) -> None:
    found = Windows(str(windows))
    assert [window.name for window in found] == [log.stem for log in logs]
    for number in (1, 4):
        prepare(logs[number], tmp_path / str(number), windows / logs[number - 1].stem, grow=False)
        rows = found.rows(found[number])
        assert _rows(rows, "test") == _rows(rows, "validation") == _rows(tmp_path / str(number), "train")
        assert _rows(rows, "train") == _rows(windows / logs[number].stem, "train")
        assert _rows(rows, "test") != _rows(rows, "train")


def test_the_warm_up_trains_validates_and_tests_in_order_of_time(windows: Path) -> None:
    found = Windows(str(windows))
    rows = found.warm_up(3)
    first = _rows(windows / "day-0", "train") + _rows(windows / "day-1", "train")
    assert _rows(rows, "train") == first and first.total() == 2 * ROWS
    assert _rows(rows, "validation") == _rows(found.rows(found[2]), "test")
    assert _rows(rows, "test") == _rows(found.rows(found[3]), "test")
    assert rows.schema.sparse_fields == found[WINDOWS - 1].dataset.schema.sparse_fields
    with pytest.raises(UserError, match="online.warm_up=7: .* has 7 windows"):
        found.warm_up(WINDOWS)


def test_ids_that_do_not_grow_are_refused(logs: list[Path], windows: Path, tmp_path: Path) -> None:
    shutil.copytree(windows / "day-0", tmp_path / "a" / "day-0")
    shutil.copytree(windows / "day-0", tmp_path / "b" / "day-0")
    prepare(logs[0], tmp_path / "other", None)
    prepare(logs[6], tmp_path / "a" / "day-6", None)  # anew, with more users: others have the same ids
    prepare(logs[1], tmp_path / "b" / "day-1", windows / "day-0")
    shutil.copytree(windows / "day-0", tmp_path / "b" / ".day-2.tmp")  # being prepared
    Windows(str(tmp_path / "b")).check_ids()
    with pytest.raises(UserError, match="day-6: ids of field 'user' are others than in window day-0; prepare it with"):
        Windows(str(tmp_path / "a")).check_ids()
    shutil.copytree(windows / "day-0", tmp_path / "b" / "day-2")
    with pytest.raises(
        UserError, match="day-2: field 'user' is vocabulary with 42 rows, in window day-1 vocabulary with"
    ):
        Windows(str(tmp_path / "b"))
    with pytest.raises(UserError, match="holds no windows"):
        Windows(str(tmp_path / "other"))
