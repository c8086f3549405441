"""Which rank holds what, before and after the search, from the stages' `sharding_plan.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sseds_rec.report.artefacts import BYTES_PER_PARAMETER, MIB, Run, printable, read_json_object
from sseds_rec.report.numbers import mib

_REPLICATED = "data_parallel"


@dataclass(frozen=True)
class Placed:
    """How one table is split.

    Attributes:
        kind: sharding type, and the kernel if it is not the usual one of that type.
        parameters: numbers in the weights on each rank, int64 [ranks].
    """

    kind: str
    parameters: np.ndarray

    @property
    def ranks(self) -> str:
        """The ranks that hold a part: "0, 2" or "all"."""
        holders = np.flatnonzero(self.parameters)
        return "all" if len(holders) == len(self.parameters) > 1 else ", ".join(map(str, holders))


@dataclass(frozen=True)
class Sharding:
    """One model's tables on the ranks: (module, table) -> where it is."""

    ranks: int
    tables: dict[tuple[str, str], Placed]

    @property
    def mib(self) -> np.ndarray:
        """Embedding weights on each rank in MiB (float32), float64 [ranks]."""
        held = sum((placed.parameters for placed in self.tables.values()), np.zeros(self.ranks, np.int64))
        return held * BYTES_PER_PARAMETER / MIB


@dataclass(frozen=True)
class Placements:
    """The full and the slim model's plans."""

    base: Sharding
    slim: Sharding

    @property
    def rows(self) -> list[tuple[str, Placed, Placed | None]]:
        """Of each table: its name, where it was, and where it is, None if it was dropped."""
        names = [name for _, name in self.base.tables]
        return [
            (
                printable(name if names.count(name) == 1 else f"{module}.{name}"),
                placed,
                self.slim.tables.get((module, name)),
            )
            for (module, name), placed in self.base.tables.items()
        ]

    @property
    def summary(self) -> str:
        """What the fullest rank holds before and after, and how even it is."""
        before, after = self.base.mib, self.slim.mib
        words = f"{mib(before.max())} MiB before and {mib(after.max())} MiB after"
        if self.base.ranks == self.slim.ranks == 1:
            return f"One rank holds all tables: {words}."
        even = " and ".join(f"{_unevenness(held):.2f}" for held in (before, after))
        return f"The fullest of {self.base.ranks} ranks holds {words}; that is {even} times the mean."


def read_placements(run: Run) -> Placements | None:
    """Both plans of a run, or None if it was made before plans were written so.

    Raises:
        UserError: one is damaged (names the file).
    """
    paths = [run.directory / stage / "sharding_plan.json" for stage in ("pretrain", "retrain")]
    if not all(path.exists() for path in paths):
        return None
    return Placements(*(read_json_object(path, _sharding) for path in paths))


def _sharding(content: Mapping[str, Any]) -> Sharding:
    ranks = content["world_size"]
    return Sharding(
        ranks,
        {
            (module, name): _placed(table, ranks)
            for module, tables in content["modules"].items()
            for name, table in tables.items()
        },
    )


def _placed(table: Mapping[str, Any], ranks: int) -> Placed:
    kind, kernel = table["sharding_type"], table["compute_kernel"]
    parameters = np.zeros(ranks, np.int64)
    if kind == _REPLICATED:
        parameters += table["rows"] * table["embedding_dim"]
    for shard in table["shards"]:
        parameters[shard["rank"]] += shard["shard_sizes"][0] * shard["shard_sizes"][1]
    usual = "dense" if kind == _REPLICATED else "fused"
    return Placed(kind if kernel == usual else f"{kind}, {kernel}", parameters)


def _unevenness(held: np.ndarray) -> float:
    return float(held.max() / held.mean()) if held.any() else 1.0
