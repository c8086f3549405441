"""A forecast's plan is the one that training makes, in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_BOTH = """
import json, sys
import torch
from sseds_rec.config import load_config
from sseds_rec.data.dataset import open_dataset
from sseds_rec.distributed.dry_plan import place
from sseds_rec.distributed.hardware import Cluster
from sseds_rec.distributed.sharding import plan_sharding, sharders_for
from sseds_rec.forecast import workloads, TableOptions
cluster = Cluster.parse(sys.argv[2])
work, _ = workloads(sys.argv[1], sys.argv[3:], None, TableOptions(), cluster)
ranks, where = cluster.world_size, cluster.topology()
sharders = sharders_for(work.sharding, torch.device(cluster.device.kind))
trained = plan_sharding(work.model, work.sharding, where, work.rows(ranks), sharders, work.beside_tables(ranks))
forecast = place(work, cluster)
print(json.dumps([plan._serialize() for plan in (forecast.plan, trained)]))
"""


def test_a_forecasts_plan_is_that_of_training_whatever_the_process(config: Path) -> None:
    found = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", _BOTH, str(config), "2x4xL4", "train.table_optimizer=rowwise_adagrad"]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed}, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1]
    forecast, trained = json.loads(found[0])
    assert forecast == trained
