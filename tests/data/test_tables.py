"""Hashed, raw and weighted fields from CSV and Parquet cells to the KJT."""

import numpy as np
import polars as pl
import pytest
import torch
import xxhash

from sseds_rec.data.loader import Loader
from sseds_rec.data.table import prepare_table
from sseds_rec.errors import UserError

ROWS = 300


@pytest.fixture(params=["csv", "parquet"])
def rows(request, tmp_path):
    """The raw rows, and a file of them."""
    random = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "row": range(ROWS),
            "user": [None if row % 7 == 0 else str(random.integers(-(2**63), 2**63 - 1)) for row in range(ROWS)],
            "device": [None if row % 11 == 0 else f"device {row % 40}" for row in range(ROWS)],
            "tags": [[f"tag {tag}" for tag in random.integers(0, 5, row % 4)] for row in range(ROWS)],
            "shops": [random.integers(0, 2**62, row % 3).tolist() for row in range(ROWS)],
            "weight": [random.random(row % 4).round(3).tolist() for row in range(ROWS)],
            "click": random.integers(0, 2, ROWS),
        },
        schema_overrides={"tags": pl.List(pl.String), "shops": pl.List(pl.Int64), "weight": pl.List(pl.Float64)},
    )
    file = tmp_path / f"rows.{request.param}"
    if request.param == "csv":
        texts = (pl.col(name).cast(pl.List(pl.String)).list.join("|") for name in ("tags", "shops", "weight"))
        frame.with_columns(texts).write_csv(file)
    else:
        frame.with_columns(pl.col("user").cast(pl.Int64)).write_parquet(file)
    return frame, file


def test_cells_reach_the_kjt(rows, tmp_path):
    frame, file = rows
    schema = prepare_table(
        [file],
        tmp_path / "out",
        label="click",
        categorical=["row", "user", "device"],
        sequence=["tags", "shops"],
        hashed={"device": 1000},
        raw={"user": 50, "shops": 60},
        weights={"tags": "weight"},
        min_count=1,
        split=(1, 0, 0),
    )
    assert {field.name: field.cardinality for field in schema.fields if field.vocabulary is None} == {
        "user": 50,
        "device": 1000,
        "shops": 60,
    }
    seen = 0
    words = dict(pl.read_parquet(tmp_path / "out/vocabulary/row.parquet").select("id", "value").iter_rows())
    tag_ids = dict(pl.read_parquet(tmp_path / "out/vocabulary/tags.parquet").select("value", "id").iter_rows())
    for batch in Loader(tmp_path / "out", "train", 32, shuffle=True):
        fields = batch.sparse.to_dict()
        cells = {name: torch.split(jagged.values(), jagged.lengths().tolist()) for name, jagged in fields.items()}
        weights = torch.split(fields["tags"].weights(), fields["tags"].lengths().tolist())
        for position, row_id in enumerate(cells["row"]):
            raw = frame.row(int(words[row_id.item()]), named=True)
            assert batch.labels[position] == raw["click"]
            assert cells["user"][position].tolist() == ([] if raw["user"] is None else [int(raw["user"])])
            device = raw["device"]
            hashed = 0 if device is None else 1 + xxhash.xxh3_64_intdigest(device.encode()) % 999
            assert cells["device"][position].tolist() == [hashed]
            assert cells["tags"][position].tolist() == [tag_ids[tag] for tag in raw["tags"]]
            assert weights[position].tolist() == pytest.approx(raw["weight"], abs=1e-6)
            assert cells["shops"][position].tolist() == raw["shops"]
            seen += 1
    assert seen == ROWS


def test_an_empty_element_is_no_raw_id_with_a_weight(tmp_path):
    lines = ["tags,weight,click", *(f"1|2,0.5|1,{row % 2}" for row in range(20)), "3||4,1|2|3,0"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    options = {"label": "click", "sequence": ["tags"], "weights": {"tags": "weight"}, "split": (1, 0, 0)}
    with pytest.raises(UserError, match=r"a\.csv, row 22: .*'tags'"):
        prepare_table([tmp_path / "a.csv"], tmp_path / "raw", raw={"tags": 50}, **options)
    prepare_table([tmp_path / "a.csv"], tmp_path / "hashed", hashed={"tags": 50}, **options)  # which has an id for it
    (batch,) = Loader(tmp_path / "hashed", "train", 21)
    assert sorted(batch.sparse["tags"].lengths().tolist()) == [2] * 20 + [3]
