"""The config of a small grid."""

from __future__ import annotations

from pathlib import Path

import pytest

GRID = """
compare:
  methods: [full, drop_ids, uniform, mde, random, sseds_paper, sseds]
  models: [fm]
  budgets: [0.5, 0.25]
  seeds: 2
  learning_rates: [0.01, 0.003]
  embedding_l2: [0.001]
  id_fields: [user]
  ablations: false
"""


@pytest.fixture(scope="session")
def grid_config(config: Path) -> Path:
    path = config.parent / "grid.yaml"
    path.write_text(config.read_text().replace("epochs: 3", "epochs: 1") + GRID)
    return path
