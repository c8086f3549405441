"""Small data sets of every format, written without the code under test, and the rows that they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES

from sseds_rec.data.config import ParquetConfig, PreparedConfig, TorchRecNpyConfig
from sseds_rec.data.schema import Field, Schema, Split

ROWS = {"train": 1003, "validation": 10, "test": 10}
KINDS = ["plain", "weighted", "npy", "parquet"]

#: label, dense inputs, ids of each field, weights of each field (None in a set without)
Row = tuple[float, tuple[float, ...], tuple[tuple[int, ...], ...], tuple[tuple[float, ...], ...] | None]
Config = PreparedConfig | TorchRecNpyConfig | ParquetConfig


def write(kind: str, folder: Path) -> tuple[Config, list[Row]]:
    """Writes a set of one of `KINDS`; returns how to open it, and the train rows in the order of the files."""
    return {"plain": _plain, "weighted": _weighted, "npy": _npy, "parquet": _parquet}[kind](folder)


def rows_of(batches: Any) -> list[Row]:
    """The rows of batches, in order."""
    rows: list[Row] = []
    for batch in batches:
        ids, weights = [], []
        for column in batch.sparse.to_dict().values():
            lengths = column.lengths().tolist()
            ids.append(_split(column.values().tolist(), lengths))
            if batch.sparse.weights_or_none() is not None:
                weights.append(_split(column.weights().tolist(), lengths))
        by_row = list(zip(*weights, strict=True)) if weights else [None] * len(batch.labels)
        dense = map(tuple, batch.dense.tolist())
        rows += zip(batch.labels.tolist(), dense, zip(*ids, strict=True), by_row, strict=True)
    return rows


def _split(values: list[Any], lengths: list[int]) -> list[tuple[Any, ...]]:
    ends = np.cumsum(lengths).tolist()
    return [tuple(values[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def write_parts(folder: Path, split: str, table: pa.Table, rows: int = 400, group: int = 100) -> list[str]:
    """Writes a table as Parquet files of `rows` rows and row groups of `group`; returns their names."""
    names = []
    for start in range(0, len(table), rows):
        names.append(f"{split}/part-{len(names):05d}.parquet")
        (folder / split).mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(start, rows), folder / names[-1], row_group_size=group)
    return names


def write_prepared(folder: Path, fields: list[Field], tables: dict[str, pa.Table]) -> None:
    """Writes a prepared set, one table a split."""
    splits = {
        split: Split(
            rows=len(table), positives=int(np.sum(table["label"].to_numpy())), files=write_parts(folder, split, table)
        )
        for split, table in tables.items()
    }
    Schema(label="click", fields=fields, seed=0, source={}, splits=splits).save(folder)


def _plain(folder: Path) -> tuple[Config, list[Row]]:
    """A sequence, two ids and a float."""
    fields = [
        Field(name="row", kind="categorical", transform="vocabulary", cardinality=1005),
        Field(name="city", kind="categorical", transform="hash", cardinality=4),
        Field(name="price", kind="numeric", transform="log1p"),
        Field(name="tags", kind="sequence", transform="vocabulary", cardinality=5),
    ]
    tables, rows = {}, []
    for seed, (split, count) in enumerate(ROWS.items()):
        random = np.random.default_rng(seed)
        label, city = random.integers(0, 2, count), random.integers(0, 4, count)
        price = random.exponential(10, count).astype(np.float32)
        tags = [random.integers(0, 5, row % 4).tolist() for row in range(count)]
        tables[split] = pa.table(
            {
                "label": pa.array(label, pa.int8()),
                "row": pa.array(range(2, count + 2), pa.int32()),
                "city": pa.array(city, pa.int32()),
                "price": price,
                "tags": pa.array(tags, pa.list_(pa.int32())),
            }
        )
        if split == "train":
            columns = (label.tolist(), city.tolist(), price.tolist(), tags)
            rows = [
                (float(y), (p,), ((row + 2,), (c,), tuple(t)), None)
                for row, (y, c, p, t) in enumerate(zip(*columns, strict=True))
            ]
    write_prepared(folder, fields, tables)
    return PreparedConfig(path=str(folder)), rows


def _weighted(folder: Path) -> tuple[Config, list[Row]]:
    """A sequence with weights, one without, a raw id that may be absent, and an id of a table too high for int32."""
    fields = [
        Field(name="tags", kind="sequence", transform="vocabulary", cardinality=5, weights="tags weights"),
        Field(name="user", kind="categorical", transform="raw", cardinality=50),
        Field(name="words", kind="sequence", transform="hash", cardinality=9),
        Field(name="ad", kind="categorical", transform="hash", cardinality=5_000_000_000),
    ]
    tables, rows = {}, []
    for seed, (split, count) in enumerate(ROWS.items()):
        random = np.random.default_rng(seed)
        label, ad = random.integers(0, 2, count), random.integers(0, 5_000_000_000, count)
        user = [None if row % 5 == 0 else int(random.integers(-(2**63), 2**63 - 1)) for row in range(count)]
        tags = [random.integers(0, 5, row % 4).tolist() for row in range(count)]
        weights = [random.random(len(tag)).astype(np.float32).tolist() for tag in tags]
        words = [random.integers(0, 9, row % 3).tolist() for row in range(count)]
        tables[split] = pa.table(
            {
                "label": pa.array(label, pa.int8()),
                "tags": pa.array(tags, pa.list_(pa.int32())),
                "tags weights": pa.array(weights, pa.list_(pa.float32())),
                "user": pa.array(user, pa.int64()),
                "words": pa.array(words, pa.list_(pa.int32())),
                "ad": pa.array(ad, pa.int64()),
            }
        )
        if split == "train":
            columns = (label.tolist(), tags, weights, user, words, ad.tolist())
            for y, t, w, u, s, a in zip(*columns, strict=True):
                ids = (tuple(t), () if u is None else (u,), tuple(s), (a,))
                mean = tuple(1 / len(s) for _ in s)
                rows.append((float(y), (), ids, (tuple(w), () if u is None else (1.0,), mean, (1.0,))))
    write_prepared(folder, fields, tables)
    return PreparedConfig(path=str(folder)), rows


def write_day(folder: Path, day: int, rows: int, highest: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Writes a day of Criteo as TorchRec's scripts do; returns dense, sparse and labels."""
    random = np.random.default_rng(day)
    dense = random.random((rows, 13)).astype(np.float32)
    sparse = random.integers(0, highest, (rows, len(DEFAULT_CAT_NAMES))).astype(np.int32)
    labels = random.integers(0, 2, (rows, 1)).astype(np.int32)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("dense", dense), ("sparse", sparse), ("labels", labels)):
        np.save(folder / f"day_{day}_{name}.npy", array)
    return dense, sparse, labels


def _npy(folder: Path) -> tuple[Config, list[Row]]:
    """Three days, the last of which is held out."""
    rows: list[Row] = []
    for day, count in enumerate((700, 303)):
        for dense, sparse, label in zip(*(array.tolist() for array in write_day(folder, day, count)), strict=True):
            rows.append((float(label[0]), tuple(dense), tuple((i,) for i in sparse), None))
    write_day(folder, 2, 20)
    return TorchRecNpyConfig(path=str(folder)), rows


def _parquet(folder: Path) -> tuple[Config, list[Row]]:
    """Other names, wider types, a boolean label, empty lists and floats, ids modulo 7 and row groups of many sizes."""
    rows: list[Row] = []
    for seed, (split, count) in enumerate(ROWS.items()):
        random = np.random.default_rng(seed)
        label = random.integers(0, 2, count)
        age = [None if row % 6 == 0 else int(random.integers(0, 99)) for row in range(count)]
        user, row_id = random.integers(-(2**62), 2**62, count), random.permutation(count).astype(np.uint16)
        cart = [None if row % 4 == 1 else random.integers(0, 20, row % 4).tolist() for row in range(count)]
        amounts = [None if items is None else random.random(len(items)).tolist() for items in cart]
        table = pa.table(
            {
                "clicked": pa.array(label.astype(bool)),
                "unused": pa.array(["x"] * count),
                "user.id": pa.array(user, pa.int64()),
                "age": pa.array(age, pa.int16()),
                "cart": pa.array(cart, pa.large_list(pa.int64())),
                "amounts": pa.array(amounts, pa.list_(pa.float64())),
                "row": pa.array(row_id),
            }
        )
        write_parts(folder, f"day={split}", table, rows=350, group=170)
        if split == "train":
            for y, a, u, c, w, r in zip(
                label.tolist(), age, user.tolist(), cart, amounts, row_id.tolist(), strict=True
            ):
                weights = tuple(float(np.float32(weight)) for weight in w or [])
                ids = ((u % 7,), (r,), tuple(c or []))
                rows.append((float(y), (float(a or 0),), ids, ((1.0,), (1.0,), weights)))
    (folder / "day=train" / "_SUCCESS.parquet").touch()
    config = ParquetConfig.model_validate(
        {
            "path": str(folder),
            "format": "parquet",
            "files": {split: f"day={split}/*.parquet" for split in ROWS},
            "label": "clicked",
            "dense": ["age"],
            "sparse": {
                "user": {"column": "user.id", "cardinality": 7, "modulo": True},
                "row": {"cardinality": 1003},
                "cart": {"cardinality": 20, "kind": "sequence", "weights": "amounts"},
            },
        }
    )
    return config, rows
