"""Writes a TSV of Criteo's shape: `python benchmarks/criteo_tsv.py ROWS FILE [--seed SEED]`.

No header; a label, 13 integers, 26 hashed strings of 8 hex digits, tab-separated; an empty cell is a missing value. Every column
is drawn on its own, row by row independently: the shape is Criteo's (cells missing, tails of the integers, distinct values and
how fast rows bring new ones), the joint distribution is not. The first rows of a longer file are those of a shorter one
of the same seed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

CHUNK = 1 << 17  # rows drawn at once
CLICKED = 0.26
LARGEST = 1 << 24  # of the integers
# Per integer column: share missing; mean and deviation of log(1 + x).
INTEGERS = [
    (0.45, 0.82, 0.99),
    (0.00, 2.36, 2.13),
    (0.20, 2.27, 1.28),
    (0.20, 1.75, 0.96),
    (0.05, 7.21, 2.92),
    (0.25, 3.58, 1.81),
    (0.05, 1.54, 1.36),
    (0.001, 2.06, 1.17),
    (0.05, 3.61, 1.69),
    (0.45, 0.38, 0.39),
    (0.05, 0.85, 0.74),
    (0.77, 0.30, 0.60),
    (0.20, 1.89, 1.06),
]
NEGATIVE = 1  # the one integer column in which -1 occurs
# Per category column: share missing, ranks that can be drawn, Zipf exponent. Exponent and ranks are such that 15 thousand and 46
# million rows have about as many distinct values as Criteo's; for large columns that takes more ranks than are ever seen.
CATEGORIES = [
    (0.00, 1460, 2.00),
    (0.00, 583, 1.57),
    (0.04, 1_000_000_000, 1.07),
    (0.04, 4_400_000, 1.11),
    (0.00, 305, 2.67),
    (0.13, 24, 1.70),
    (0.00, 12_517, 1.02),
    (0.00, 633, 2.28),
    (0.00, 3, 3.00),
    (0.00, 93_145, 1.14),
    (0.00, 5683, 1.12),
    (0.04, 830_000_000, 1.08),
    (0.00, 3194, 1.10),
    (0.00, 27, 3.15),
    (0.00, 14_992, 1.20),
    (0.04, 110_000_000, 1.09),
    (0.00, 10, 1.30),
    (0.00, 5652, 1.34),
    (0.44, 2173, 1.40),
    (0.44, 4, 1.01),
    (0.04, 350_000_000, 1.08),
    (0.82, 18, 2.00),
    (0.00, 15, 2.50),
    (0.04, 290_000, 1.20),
    (0.44, 105, 2.79),
    (0.44, 142_572, 1.14),
]
COLUMNS = ["label", *(f"I{i + 1}" for i in range(len(INTEGERS))), *(f"C{i + 1}" for i in range(len(CATEGORIES)))]


def integers(random: np.random.Generator, rows: int, column: int) -> pa.Array:
    """int64 [rows]: floor(e^y) - 1 of a normal y, so log-normal with a pile at zero."""
    missing, mean, deviation = INTEGERS[column]
    values = np.exp(random.normal(mean, deviation, rows)).astype(np.int64) - 1
    values = values.clip(-1 if column == NEGATIVE else 0, LARGEST)
    return pa.array(values, mask=random.random(rows, np.float32) < missing)


def categories(random: np.random.Generator, rows: int, column: int) -> pa.Array:
    """string [rows]: ranks of a truncated power law (its distribution function inverted), hashed one to one to 32 bits."""
    missing, ranks, exponent = CATEGORIES[column]
    power = 1 - exponent
    ids = ((((ranks + 1) ** power - 1) * random.random(rows) + 1) ** (1 / power)).astype(np.uint32)
    hashed = (ids + np.uint32(column << 24)) * np.uint32(2_654_435_761)
    digits = pa.py_buffer(hashed.astype(">u4").tobytes().hex().encode())
    offsets = pa.py_buffer(np.arange(rows + 1, dtype=np.int32) * 8)
    present = pa.array(random.random(rows, np.float32) >= missing).buffers()[1]
    return pa.StringArray.from_buffers(rows, offsets, digits, present)


def chunk(seed: int, number: int) -> pl.DataFrame:
    """Rows `number * CHUNK` and following, `CHUNK` of them."""
    random = np.random.default_rng([seed, number])
    columns: list[pa.Array] = [pa.array((random.random(CHUNK, np.float32) < CLICKED).astype(np.int8))]
    columns += [integers(random, CHUNK, column) for column in range(len(INTEGERS))]
    columns += [categories(random, CHUNK, column) for column in range(len(CATEGORIES))]
    frame = pl.from_arrow(pa.table(columns, names=COLUMNS))
    assert isinstance(frame, pl.DataFrame)
    return frame


def write(path: Path, rows: int, seed: int) -> None:
    """Writes the file under a temporary name, then renames it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for number, start in enumerate(range(0, rows, CHUNK)):
            chunk(seed, number).head(rows - start).write_csv(
                file, include_header=False, separator="\t", quote_style="never"
            )
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=2022)
    arguments = parser.parse_args()
    write(arguments.file, arguments.rows, arguments.seed)


if __name__ == "__main__":
    main()
