"""Parquet of other tools, and data sets in a remote store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sseds_rec.data import parquet
from sseds_rec.data.config import ParquetConfig
from sseds_rec.data.dataset import open_dataset
from sseds_rec.data.loader import Loader
from sseds_rec.errors import UserError
from tests.data import sets
from tests.data.sets import rows_of
from tests.store import registered

GOOD = {
    "click": [0, 1, 1, 0, 1],
    "age": [1.5, None, 3.0, 4.0, 5.0],
    "user": [0, 1, 2, 3, 4],
    "tags": [[1], [], None, [2, 3], [0]],
    "scores": [[0.5], [], None, [1.0, 2.0], [3.0]],
}


def _open(folder: Path, change: dict[str, Any] | None = None, **columns: Any) -> Any:
    """Writes GOOD with some columns replaced to two files, the second of them to train on, and opens it."""
    keys = {
        "path": str(folder),
        "format": "parquet",
        "files": {"train": "b*.parquet", "validation": "a.parquet", "test": "c.parquet"},
        "label": "click",
        "dense": ["age"],
        "sparse": {
            "user": {"cardinality": 5},
            "tags": {"cardinality": 4, "kind": "sequence", "weights": "scores"},
        },
    }
    for name in ("a", "c"):
        pq.write_table(pa.table(GOOD), folder / f"{name}.parquet")
    table = pa.table({name: column for name, column in (GOOD | columns).items() if column is not None})
    pq.write_table(table, folder / "b1.parquet", row_group_size=3)
    return open_dataset(ParquetConfig.model_validate(keys | (change or {})))


def test_the_schema_is_what_the_config_says(tmp_path: Path) -> None:
    schema = _open(tmp_path).schema
    assert [(f.name, f.cardinality, f.is_single, f.weights) for f in schema.fields] == [
        ("age", None, True, None),
        ("user", 5, True, None),
        ("tags", 4, False, "scores"),
    ]
    assert schema.is_weighted and {(split.rows, split.positives) for split in schema.splits.values()} == {(5, 3)}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": [0, 1, 2, 3, 5]}, "b1.parquet, row 5: field 'user': id 5 is outside its table of 5 rows"),
        ({"user": [0, 1, 2, -1, 4]}, "b1.parquet, row 4: field 'user': id -1 is outside its table of 5 rows"),
        ({"user": [0, 1, 2, 3, None]}, "b1.parquet, row 5: 'user' is empty"),
        ({"user": ["u0", "u1", "u2", "u3", "u4"]}, "column 'user' holds string, .* `sseds prepare table`"),
        ({"user": [[0], [1], [2], [3], [4]]}, "column 'user' holds list<.*>, not integers"),
        ({"user": None}, r"b1.parquet: no column 'user' \(the nearest name is 'scores'\)"),
        ({"tags": [[1], [], None, [2, 9], [0]]}, "b1.parquet, row 4: field 'tags': id 9 is outside"),
        ({"tags": [[1], [], None, [2, None], [0]]}, "b1.parquet, row 4: 'tags' has an empty element"),
        ({"tags": [1, 2, 3, 0, 1]}, "column 'tags' holds int64, not lists of integers"),
        ({"scores": [[0.5], [], None, [1.0], [3.0]]}, "row 4: 'scores' has 1 weights for the 2 ids of 'tags'"),
        ({"scores": [[0.5], [], None, [1.0, np.inf], [3.0]]}, "b1.parquet, row 4: 'scores' is inf"),
        ({"age": [1.0, 2.0, 3.0, 1e300, 5.0]}, "b1.parquet, row 4: 'age' is inf"),
        ({"age": ["1", "2", "3", "4", "5"]}, "column 'age' holds string, not numbers"),
        ({"click": [0, 1, 1, 2, 1]}, "b1.parquet, row 4: label 2 is neither 0 nor 1"),
        ({"click": [0, 1, 1, 0, None]}, "b1.parquet, row 5: 'click' is empty"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        list(Loader(_open(tmp_path, **columns), "train", 2))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("type_", [pa.int8(), pa.uint8(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()])
def test_modulo_of_integers_of_any_type(tmp_path: Path, type_: pa.DataType) -> None:
    bits, signed = type_.bit_width, pa.types.is_signed_integer(type_)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    ids = [low, low + 1, 77, high - 1, high]
    change = {"sparse": {"user": {"cardinality": 1000, "modulo": True}}}
    dataset = _open(tmp_path, change, user=pa.array(ids, type_))
    assert [row[2] for row in rows_of(Loader(dataset, "train", 5))] == [((id_ % 1000,),) for id_ in ids]


def test_files_are_found_once_and_in_one_split(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        for part in ("part-1", "part-0", ".part-2", "_part-3"):
            (tmp_path / f"set={split}").mkdir(exist_ok=True)
            pq.write_table(pa.table(GOOD), tmp_path / f"set={split}" / f"{part}.parquet")
    patterns = {"train": ["set=tr*/*.parquet", "set=train/part-0.parquet"], "validation": "set=v*/*1.parquet"}
    opened = _open(tmp_path, {"files": patterns | {"test": "set=test/part-[0].parquet"}})
    assert [Path(file).relative_to(tmp_path).as_posix() for file in opened.schema.splits["train"].files] == [
        "set=train/part-0.parquet",
        "set=train/part-1.parquet",
    ]
    assert [opened.schema.splits[split].rows for split in ("train", "validation", "test")] == [10, 5, 5]
    with pytest.raises(UserError, match=r"set=x\*: no such file, named in data.files.test"):
        _open(tmp_path, {"files": patterns | {"test": "set=x*"}})
    with pytest.raises(UserError, match=r"part-0.parquet: is in both data.files.train and data.files.test"):
        _open(tmp_path, {"files": patterns | {"test": "set=train/*"}})


def test_a_large_row_group_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BLOCK_ROWS", 1000)
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 70)
    ids = np.random.default_rng(0).integers(0, 10**6, 2500)
    columns = {"click": np.arange(2500) % 2, "user": ids}
    for name in "abc":
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    keys = {"label": "click", "sparse": {"user": {"cardinality": 10**6}}, "format": "parquet", "path": str(tmp_path)}
    files = {"train": "a.parquet", "validation": "b.parquet", "test": "c.parquet"}
    blocks = open_dataset(ParquetConfig.model_validate(keys | {"files": files})).blocks("train")
    assert blocks.sizes == [833, 833, 834]
    read = [blocks.read(index).ids[0] for index in (2, 0, 1)]
    assert np.array_equal(np.concatenate([read[1], read[2], read[0]]), ids)
    with pytest.raises(UserError, match="a.parquet, row 1666: label 2 is neither"):
        pq.write_table(pa.table(columns | {"click": np.arange(2500) // 1665 * 2}), tmp_path / "a.parquet")
        list(Loader(open_dataset(ParquetConfig.model_validate(keys | {"files": files})), "train", 10))


@pytest.mark.parametrize("kind", sets.KINDS)
def test_sets_are_read_from_any_store_that_iopath_knows(tmp_path: Path, kind: str) -> None:
    config, rows = sets.write(kind, tmp_path / "logs")
    with registered(tmp_path) as store:
        dataset = open_dataset(config.model_copy(update={"path": "test://logs"}))
        assert rows_of(Loader(dataset, "train", 100)) == rows
    assert store.opened and all(path.startswith("test://logs/") for path in store.opened)


CONFIG = """
name: tiny
device: cpu
model: {embedding_dim: 8, hidden: [8]}
train: {epochs: 1, batch_size: 128, learning_rate: 0.02}
search: {budget: {parameters: 0.5}}
data:
"""
NPY = "  {path: DATA, format: torchrec_npy, cardinality: 12}"
PARQUET = """
  path: DATA
  format: parquet
  files: {train: day=train/*.parquet, validation: day=validation/*.parquet, test: day=test/*.parquet}
  label: clicked
  dense: [age]
  sparse:
    user: {column: user.id, cardinality: 7, modulo: true}
    row: {cardinality: 1003}
    cart: {cardinality: 20, kind: sequence, weights: amounts}
"""


@pytest.mark.parametrize(("kind", "data"), [("npy", NPY), ("parquet", PARQUET)])
def test_the_command_line_trains_searches_and_slims(
    tmp_path: Path, sseds: Callable[..., Any], kind: str, data: str
) -> None:
    sets.write(kind, tmp_path / "set")
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG + data.replace("DATA", str(tmp_path / "set")))
    done = sseds("run", config, "--run-dir", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    metrics = done.json["metrics"]
    assert metrics["search"]["reached"]["parameters"]["fraction"] <= 0.5
    assert metrics["pretrain"]["steps"] == metrics["retrain"]["steps"] == 1003 // 128
    again = sseds("evaluate", config, "--run-dir", tmp_path / "run", "--stage", "retrain", "--json")
    assert again.json["auc"] == metrics["retrain"]["auc"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (NPY.replace("cardinality", "cardinalty"), "unknown key data.cardinalty; did you mean data.cardinality?"),
        (NPY.replace("12", "[12, 3]"), "data.cardinality: List should have at least 26 items"),
        (NPY.replace("12", "0"), "data.cardinality.0=0: Input should be greater than 0"),
        (NPY.replace("torchrec_npy", "npy"), "data: data.format must be one of sseds, torchrec_npy, parquet"),
        (NPY.replace("12", "12, test: [1]"), "name the days of both validation and test"),
        (NPY.replace("12", "12, test: [1], validation: [2, 1]"), "day 1 is named twice"),
        ("  {path: DATA, days: 3}", "unknown key data.days; valid keys: path, format"),
        (
            PARQUET.replace("modulo", "modul"),
            "unknown key data.sparse.user.modul; did you mean data.sparse.user.modulo?",
        ),
        (PARQUET.replace("cardinality: 1003", "modulo: true"), "data.sparse.row.cardinality is missing"),
        (PARQUET.replace("validation:", "valid:"), "data.files.validation is missing"),
        (PARQUET.replace("cardinality: 1003", "cardinality: 9, weights: age"), "weights go with kind=sequence"),
        (PARQUET.replace("[age]", "[age, row]"), "'row' is listed twice among dense and sparse"),
        (PARQUET.replace("[age]", "[clicked]"), "column 'clicked' is both the label and an input"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(
    tmp_path: Path, sseds: Callable[..., Any], data: str, message: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG + data)
    refused = sseds("train", config, "--run-dir", tmp_path / "run")
    assert refused.code == 2 and refused.err.count("\n") == 1 and message in refused.err
    assert not (tmp_path / "run").exists()
