"""TorchRec's preprocessed Criteo: the rows that TorchRec's own reader gives, split as it splits them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES, DEFAULT_INT_NAMES, InMemoryBinaryCriteoIterDataPipe

from sseds_rec.data import npy
from sseds_rec.data.config import TorchRecNpyConfig
from sseds_rec.data.dataset import open_dataset
from sseds_rec.data.loader import Loader
from sseds_rec.errors import UserError
from tests.data.sets import write_day

HASHES = [3 + column for column in range(26)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npy, "BLOCK_ROWS", 100)


def _open(folder: Path, **keys: Any) -> npy.TorchRecNpy:
    dataset = open_dataset(TorchRecNpyConfig.model_validate({"path": str(folder), "format": "torchrec_npy", **keys}))
    assert isinstance(dataset, npy.TorchRecNpy)
    return dataset


def _joined(batches: Iterable[Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Dense, labels and ids of all rows, from our batches or TorchRec's."""
    all_ = [(b.dense, b.sparse, b.labels) if hasattr(b, "dense") else tuple(b.__dict__.values()) for b in batches]
    dense, sparse, labels = zip(*all_, strict=True)
    columns = [kjt.to_dict() for kjt in sparse]
    ids = {key: torch.cat([column[key].values() for column in columns]) for key in columns[0]}
    return torch.cat(dense), torch.cat(labels), ids


@pytest.mark.parametrize("hashes", [HASHES, None])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_rows_and_splits_are_those_of_torchrecs_own_reader(
    tmp_path: Path, split: Any, hashes: list[int] | None
) -> None:
    for day, rows in enumerate((230, 150, 61)):
        write_day(tmp_path, day, rows)
    days = [0, 1] if split == "train" else [2]
    paths = [[str(tmp_path / f"day_{day}_{part}.npy") for day in days] for part in ("dense", "sparse", "labels")]
    stage = "val" if split == "validation" else split
    reference = InMemoryBinaryCriteoIterDataPipe(stage, *paths, batch_size=40, rank=0, world_size=1, hashes=hashes)
    dataset = _open(tmp_path, cardinality=hashes)
    ours, theirs = _joined(Loader(dataset, split, 40)), _joined(reference)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1].float())
    assert list(ours[2]) == DEFAULT_CAT_NAMES == list(theirs[2])
    assert all(torch.equal(ours[2][key], theirs[2][key].long()) for key in DEFAULT_CAT_NAMES)
    assert dataset.schema.splits[split].rows == len(theirs[1])
    assert dataset.schema.splits[split].positives == int(theirs[1].sum())
    assert [field.name for field in dataset.schema.dense_fields] == DEFAULT_INT_NAMES


def test_tables_are_as_large_as_the_ids_or_the_config_say(tmp_path: Path) -> None:
    sparse = np.concatenate([write_day(tmp_path, day, 200)[1] for day in (0, 1)])
    assert [field.cardinality for field in _open(tmp_path).schema.sparse_fields] == (sparse.max(axis=0) + 1).tolist()
    assert {field.cardinality for field in _open(tmp_path, cardinality=5).schema.sparse_fields} == {5}
    write_day(tmp_path, 2, 200, highest=10**6)
    with pytest.raises(UserError, match=r"cat_\d+ has an id \d+ in 600 rows, so .* set data.cardinality"):
        _open(tmp_path)


def test_days_can_be_named_and_a_single_day_is_cut_in_order(tmp_path: Path) -> None:
    def labels(split: Any, **keys: Any) -> list[float]:
        return [label for batch in Loader(_open(tmp_path, **keys), split, 10) for label in batch.labels.tolist()]

    stored = [write_day(tmp_path, 3, 105)[2][:, 0].tolist()]
    assert [labels(split) for split in ("train", "validation", "test")] == [
        stored[0][:84],
        stored[0][84:94],
        stored[0][94:],
    ]
    stored += [write_day(tmp_path, day, 50 + day)[2][:, 0].tolist() for day in (4, 5, 12)]
    named = {"validation": [4], "test": [3]}
    assert [labels(split, **named) for split in ("train", "validation", "test")] == [
        stored[2] + stored[3],
        stored[1],
        stored[0],
    ]
    assert labels("train", **named, train=[12]) == stored[3]
    assert labels("train", train=[5, 3]) == stored[2] + stored[0] and labels("validation") == stored[3][:31]
    with pytest.raises(UserError, match="data.train names day 12, the last, which is held out"):
        _open(tmp_path, train=[5, 12])
    with pytest.raises(UserError, match="data.validation and data.test name all days"):
        _open(tmp_path, validation=[3, 4], test=[5, 12])
    with pytest.raises(UserError, match=r"day_7_dense.npy: no such file"):
        _open(tmp_path, validation=[3], test=[7])


def test_one_column_of_labels_and_wide_ids_are_taken(tmp_path: Path) -> None:
    _, sparse, labels = write_day(tmp_path, 0, 100)
    before = _joined(Loader(_open(tmp_path, cardinality=1000), "train", 10))
    np.save(tmp_path / "day_0_labels.npy", labels[:, 0])
    np.save(tmp_path / "day_0_sparse.npy", sparse.astype(np.int64) + 10**12)
    after = _joined(Loader(_open(tmp_path, cardinality=1000), "train", 10))
    assert torch.equal(before[1], after[1]) and all(torch.equal(before[2][key], after[2][key]) for key in before[2])


def _set(row: int, column: int, value: float) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array[row - 1, column] = value
        return array

    return change


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("dense", lambda a: a[:, :12], r"day_1_dense.npy: is an array \[150, 12\], not \[rows, 13\]"),
        ("dense", lambda a: a.astype(np.float64), "day_1_dense.npy: holds float64, not float32"),
        ("sparse", lambda a: a.astype(np.float32), "day_1_sparse.npy: holds float32, not int32 or int64"),
        ("sparse", lambda a: a[:149], "day_1_sparse.npy: has 149 rows, .*day_1_dense.npy has 150"),
        ("sparse", np.asfortranarray, "day_1_sparse.npy: is stored column by column"),
        ("sparse", _set(123, 4, -1), "day_1_sparse.npy, row 123: cat_4: id -1 is negative"),
        ("labels", _set(123, 0, -1), "day_1_labels.npy, row 123: label -1 is neither 0 nor 1"),
        ("labels", None, "day_1_labels.npy: no such file"),
        ("dense", "text", "day_1_dense.npy: not a NumPy file"),
        ("dense", "cut", "day_1_dense.npy: is cut short, it ends before row 149"),
        ("dense", _set(123, 4, np.inf), "day_1_dense.npy, row 123: 'int_4' is inf"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, part: str, change: Any, message: str) -> None:
    for day, rows in enumerate((100, 150, 50)):
        write_day(tmp_path, day, rows)
    file = tmp_path / f"day_1_{part}.npy"
    if change is None:
        file.unlink()
    elif change == "text":
        file.write_text("no array")
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:-60])
    else:
        np.save(file, change(np.load(file)))
    with pytest.raises(UserError, match=message) as refused:
        list(Loader(_open(tmp_path), "train", 10))
    assert "\n" not in str(refused.value)


def test_a_folder_without_days_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no day_N_dense.npy"):
            _open(folder)
