"""`sseds online` end to end: order, counts, resuming, several ranks, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from sseds_rec.config import load_config
from sseds_rec.data.batch import Batch
from sseds_rec.data.loader import Loader
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.models import build_model
from sseds_rec.online.experiment import Online
from sseds_rec.online.records import Record
from sseds_rec.online.windows import Windows
from sseds_rec.run_directory import RunDirectory
from sseds_rec.search.plan import DimensionPlan
from tests.online.conftest import ROWS, WINDOWS, Sseds
from tests.online.runs import command, results, table
from tests.ranks import run_ranks


class _Plain(nn.Module):
    """The base model in plain PyTorch: one `nn.EmbeddingBag` a field below the same model over them."""

    def __init__(self, stream: Path, windows: Windows, checkpoint: Path, folder: Path) -> None:
        super().__init__()
        config = load_config(stream)
        dcp_to_torch_save(checkpoint, folder / "weights.pt")
        weights = torch.load(folder / "weights.pt", weights_only=False)["model"]
        self.l2 = config.train.embedding_l2
        self.over = build_model(config.model, windows.schema).over
        self.over.load_state_dict({k.removeprefix("over."): v for k, v in weights.items() if k.startswith("over.")})
        self.tables = nn.ModuleDict()
        for field in windows.schema.sparse_fields:
            table = weights[f"embeddings.embedding_bags.{field.name}.weight"]
            mode = "mean" if field.kind == "sequence" else "sum"
            self.tables[field.name] = nn.EmbeddingBag.from_pretrained(table.clone(), freeze=False, mode=mode)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits, and the loss with its penalty."""
        bags = batch.sparse.to_dict()
        embedded = [
            table(bags[name].values(), bags[name].offsets()[: len(batch.labels)]) for name, table in self.tables.items()
        ]
        x = torch.cat(embedded, dim=1)
        fields = torch.stack(embedded, dim=1)
        pairs = 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(1)
        inputs = torch.cat([batch.dense, x], dim=1)
        logits = self.over.first_order(inputs)[:, 0] + pairs + self.over.output(self.over.deep(inputs))[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
        return logits, loss + 0.5 * self.l2 * x.square().sum() / len(batch.labels)


def _auc(logits: np.ndarray, labels: np.ndarray) -> float:
    order = (logits[labels > 0][:, None] > logits[labels == 0]).mean()
    ties = (logits[labels > 0][:, None] == logits[labels == 0]).mean()
    return float(order + ties / 2)


def test_each_window_is_predicted_by_a_model_that_knows_the_ones_before_only(
    stream: Path, windows: Path, followed: Path, tmp_path: Path
) -> None:
    found = Windows(str(windows))
    model = _Plain(stream, found, followed / "pretrain" / "checkpoint", tmp_path)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    measured = table(followed).filter(pl.col("model") == "base")
    for number, window in enumerate(found[2:], start=2):
        rows = found.rows(window)
        if number > 2:  # the last of the warm-up
            with torch.no_grad():
                batches = list(Loader(rows, "test", 250))
                logits = torch.cat([model(batch)[0] for batch in batches]).double()
            labels = torch.cat([batch.labels for batch in batches]).double()
            record = measured.row(by_predicate=pl.col("window") == window.name, named=True)
            assert record["auc"] == pytest.approx(_auc(logits.numpy(), labels.numpy()), abs=2e-4)
            logloss = F.binary_cross_entropy_with_logits(logits, labels)
            assert record["logloss"] == pytest.approx(float(logloss), abs=2e-4)
        loader = Loader(rows, "train", 250, seed=7, shuffle=True)
        loader.set_epoch(number)
        for batch in loader:
            optimizer.zero_grad()
            model(batch)[1].backward()
            optimizer.step()


def test_parameters_in_use_are_those_of_ids_in_the_vocabularies(followed: Path, windows: Path) -> None:
    first = DimensionPlan.load(followed / "search" / "plan.json")
    (stored,) = (followed / "online").glob("window-*")
    last = DimensionPlan.load(stored / "plan.json")
    fields = ("user", "ad", "noise", "tags")
    capacity = {
        f: pl.read_parquet(windows / f"day-{WINDOWS - 1}" / "vocabulary" / f"{f}.parquet").height for f in fields
    }
    for plan, day in ((first, 3), (last, WINDOWS - 1)):
        known = {f: pl.read_parquet(windows / f"day-{day}" / "vocabulary" / f"{f}.parquet").height for f in fields}
        assert day == WINDOWS - 1 or known["user"] < capacity["user"]
        widths = {"base": dict.fromkeys(fields, 16), "slim": {f: plan.tables[f].stored_dim for f in fields}}
        for model, dims in widths.items():
            (row,) = table(followed).filter((pl.col("window") == f"day-{day}") & (pl.col("model") == model)).to_dicts()
            assert row["embedding_parameters_in_use"] == sum(known[f] * dims[f] for f in fields)
            assert row["embedding_parameters"] == sum(capacity[f] * dims[f] for f in fields)
            assert model == "base" or row["embedding_parameters"] <= 0.25 * 16 * sum(capacity.values())


def test_what_a_run_leaves(followed: Path) -> None:
    rows = table(followed)
    assert rows["window"].to_list() == [f"day-{day}" for day in range(3, WINDOWS) for _ in range(2)]
    assert rows["model"].to_list() == ["base", "slim"] * (WINDOWS - 3) and set(rows["rows"]) == {ROWS}
    searched = rows.filter(pl.col("searched"))
    assert searched.select("window", "model").rows() == [("day-4", "slim"), ("day-6", "slim")]
    metrics = json.loads((followed / "online" / "metrics.json").read_text())
    for model in ("base", "slim"):
        own = rows.filter(pl.col("model") == model)
        for key in ("auc", "logloss", "embedding_parameters_in_use"):
            assert metrics[model][key] == pytest.approx(sum(own[key]) / len(own))
        assert own["auc"].min() > 0.55
    assert metrics["windows"] == WINDOWS - 3 and metrics["searches"] == ["day-4", "day-6"]
    first = DimensionPlan.load(followed / "search" / "plan.json")
    (last,) = (DimensionPlan.load(path) for path in (followed / "online").glob("window-*/plan.json"))
    assert last.search["window"] == "day-6"
    assert "scales" in first.search and "scales" not in last.search  # new searches rescale nothing
    page = (followed / "report" / "online.html").read_text()
    assert page.count("<svg") == 3 and not re.search(r"https?://(?!www.w3.org)", page)
    for day in range(3, WINDOWS):
        assert f"day-{day}" in page
    assert f"{metrics['base']['auc']:.4f} → {metrics['slim']['auc']:.4f}" in page


def test_a_killed_run_goes_on_to_the_same_result(stream: Path, followed: Path, sseds: Sseds, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    process = subprocess.Popen(command(stream, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "online" / "window-00004").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = sseds("online", stream, "--run-dir", run, "--json")
    assert done.code == 0, done.err
    assert results(run) == results(followed)
    assert done.json["metrics"]["searches"] == ["day-4", "day-6"]
    assert [path.name for path in (run / "online").glob("*window-*")] == [f"window-{WINDOWS - 1:05d}"]


class _Stopped(Exception):
    pass


def _online(rank: int, world_size: int, stream: Path, folder: Path, settings: list[str], stops: bool = False) -> int:
    """Follows the windows as the command does, or gives up after each of them and begins again; how often it began."""

    def stop(base: Record, slim: Record) -> None:
        raise _Stopped

    runtime, config = Runtime(rank, world_size, torch.device("cpu")), load_config(stream, settings)
    begun = 0
    while True:
        begun += 1
        experiment = Online(config, Windows(config.data.path), RunDirectory(folder), runtime)
        experiment.begin()
        for stage in ("pretrain", "search", "slim", "retrain"):
            if not experiment.run.done(stage):
                getattr(experiment, stage)()
                runtime.barrier()
        try:
            experiment.follow(stop) if stops else experiment.follow()
            return begun
        except _Stopped:
            pass


def test_a_run_that_stops_after_every_window_has_the_same_result_and_goes_on_with_later_ones(
    stream: Path, windows: Path, followed: Path, sseds: Sseds, tmp_path: Path
) -> None:
    run, growing = tmp_path / "run", tmp_path / "windows"
    shutil.copytree(windows, growing)
    settings = [f"data.path={growing}"]
    assert run_ranks(1, _online, stream, run, settings, True) == [WINDOWS - 3 + 1]
    assert results(run) == results(followed)
    shutil.copytree(growing / f"day-{WINDOWS - 1}", growing / "day-9")  # with ids for which there is room
    assert run_ranks(1, _online, stream, run, settings, True) == [2]
    assert results(run)[:-2] == results(followed) and {row["window"] for row in results(run)[-2:]} == {"day-9"}
    shutil.copytree(growing / "day-9", growing / "day-91")  # as many users, but others under the same ids
    (vocabulary,) = (growing / "day-91/vocabulary").glob("user*")
    values = pl.read_parquet(vocabulary)
    values.with_columns(pl.col("value").reverse()).write_parquet(vocabulary)
    refused = sseds("online", stream, "--run-dir", run, *settings)
    assert refused.code == 2 and "day-91: ids of field 'user' are others than in window day-9" in refused.err


def test_new_ids_of_later_windows_need_room(stream: Path, windows: Path, sseds: Sseds, tmp_path: Path) -> None:
    """A stream that has ended with its fifth window goes on with all: its tables have the rows that were reserved."""
    growing = tmp_path / "windows"
    for number in range(5):
        shutil.copytree(windows / f"day-{number}", growing / f"day-{number}")
    for spare in (0, 1):
        assert (
            sseds(
                "online", stream, "--windows", growing, "--run-dir", tmp_path / f"{spare}", f"online.spare={spare}"
            ).code
            == 0
        )
    for number in range(5, WINDOWS):
        shutil.copytree(windows / f"day-{number}", growing / f"day-{number}")
    refused = sseds("online", stream, "--windows", growing, "--run-dir", tmp_path / "0", "online.spare=0")
    assert refused.code == 2 and "ids by now, and the tables of this run have room for" in refused.err
    assert sseds("online", stream, "--windows", growing, "--run-dir", tmp_path / "1", "online.spare=1").code == 0
    base = table(tmp_path / "1").filter(pl.col("model") == "base")
    assert base["window"].to_list()[-1] == f"day-{WINDOWS - 1}"
    assert len(set(base["embedding_parameters"])) == 1
    assert base["embedding_parameters_in_use"].is_sorted() and base["embedding_parameters_in_use"].n_unique() > 2


def test_two_ranks_with_sharded_tables(stream: Path, followed: Path, tmp_path: Path) -> None:
    settings = ["train.table_optimizer=rowwise_adagrad", "train.table_learning_rate=0.05", "online.returning=random"]
    for ranks in (1, 2):
        run_ranks(ranks, _online, stream, tmp_path / str(ranks), settings)
    one, two = table(tmp_path / "1"), table(tmp_path / "2")
    counts = ["window", "model", "rows", "searched"]
    assert two.select(counts).equals(one.select(counts))
    assert ((one["auc"] - two["auc"]).abs() < 0.05).all() and one["auc"].min() > 0.55
    base = [frame.filter(pl.col("model") == "base")["embedding_parameters_in_use"] for frame in (one, two)]
    assert base[0].equals(base[1])


def test_what_is_refused(stream: Path, windows: Path, followed: Path, sseds: Sseds, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cases = {
        ("online.warm_up=7",): "online.warm_up=7",
        ("search.method=uniform",): "search.method=uniform",
        ("retrain.transform=random",): "retrain.transform=random with online.research_every",
        ("--windows", str(tmp_path / "none")): "holds no windows",
        ("online.warm=3",): "did you mean online.warm_up?",
    }
    for settings, complaint in cases.items():
        done = sseds("online", stream, "--run-dir", run, *settings)
        assert done.code == 2 and done.err.count("\n") == 1 and complaint in done.err, settings
        assert not run.exists()
    shutil.copytree(followed, run)
    done = sseds("online", stream, "--run-dir", run, "online.epochs=2")
    assert done.code == 2 and "online.epochs=1, now it is 2; choose another --run-dir" in done.err
    done = sseds("online", stream, "--run-dir", run, "--windows", str(windows) + "/")
    assert done.code == 2 and "was run with data.path=" in done.err
    settings_file = run / "online/settings.json"
    begun = json.loads(settings_file.read_text())
    del begun["table_rows"]["noise"]
    settings_file.write_text(json.dumps(begun))
    done = sseds("online", stream, "--run-dir", run)
    assert done.code == 2 and done.err.count("\n") == 1
    assert "begun with tables of user, ad, tags, and now they are of user, ad, noise, tags" in done.err
    assert results(run) == results(followed)
