"""What the methods of a comparison cost: seconds, samples a second, bytes, trials."""

from __future__ import annotations

import math

import polars as pl

from sseds_rec.compare.statistics import summarize
from sseds_rec.report.compare_artefacts import Grid
from sseds_rec.report.compare_tables import CHOSEN, FULL, Table, at_shown, ordered, own_rows, ratio
from sseds_rec.report.numbers import count, number, percent, text


def time_table(grid: Grid) -> Table:
    summary = at_shown_budget(grid)
    own, full = (
        {row["model"]: row for row in summary.rows(named=True) if row["method"] == method} for method in (CHOSEN, FULL)
    )
    rows = []
    for row in summary.rows(named=True):
        chosen, whole = own.get(row["model"], {}), full.get(row["model"], {})
        speed = row["inference_samples_per_second"]
        rows.append(
            [
                row["model"],
                row["method"],
                text(number(row["pretrain_seconds"]), ",.1f"),
                text(number(row["search_seconds"]), ",.2f"),
                ratio(row["search_seconds"], chosen.get("search_seconds")),
                text(number(row["retrain_seconds"]), ",.1f"),
                text(number(row["total_seconds"]), ",.1f"),
                ratio(row["total_seconds"], chosen.get("total_seconds")),
                count(speed),
                ratio(speed, whole.get("inference_samples_per_second")),
            ]
        )
    return Table(
        id="seconds",
        title=f"Seconds of training and speed of inference{at_shown(grid)}",
        columns=[
            "Model", "Method", "Pretrain s", "Search s", f"Search / {CHOSEN}", "Retrain s", "Total s", f"Total / {CHOSEN}",
            "Inference samples/s", "Inference / full",
        ],
        rows=rows,
        note=f"Means over seeds. Measured with {grid.about.processes} models in training side by side on the same "
        "machine: compare the columns with each other, not with other machines.",
        heads=2,
        own=own_rows(rows),
    )  # fmt: skip


def at_shown_budget(grid: Grid) -> pl.DataFrame:
    """Times and speeds of every model and method, means over the seeds, at the budget that figures show."""
    times = ["pretrain_seconds", "search_seconds", "retrain_seconds"]
    frame = grid.results.filter(grid.is_shown | pl.col("budget").is_null())
    frame = frame.with_columns(total_seconds=pl.sum_horizontal(times))
    return ordered(
        grid, summarize(frame, ["model", "method"], [*times, "total_seconds", "inference_samples_per_second"])
    )


def storage_table(grid: Grid) -> Table | None:
    """Bytes of the element-wise methods as a dense table and as CSR, beside what the slim models take; None if none ran."""
    frame = grid.results.filter(pl.col("budget").is_not_null())
    sparse = frame.filter(pl.col("csr_bytes").is_not_null())
    if sparse.is_empty():
        return None
    dense = frame.filter(pl.col("csr_bytes").is_null()).group_by("model", "budget").agg(pl.col("dense_bytes").mean())
    slim = {(model, budget): size for model, budget, size in dense.iter_rows()}
    summary = summarize(sparse, ["model", "method", "budget"], ["embedding_parameters", "dense_bytes", "csr_bytes"])
    rows = [
        [
            row["model"],
            row["method"],
            percent(row["budget"]),
            count(row["embedding_parameters"]),
            count(row["dense_bytes"]),
            count(row["csr_bytes"]),
            count(slim.get(key := (row["model"], row["budget"]), math.nan)),
            ratio(row["csr_bytes"], slim.get(key)),
        ]
        for row in ordered(grid, summary).rows(named=True)
    ]
    return Table(
        id="storage",
        title="What element-wise pruning stores",
        columns=[
            "Model",
            "Method",
            "Budget",
            "Nonzeros",
            "Dense bytes",
            "CSR bytes",
            "Slim models' bytes",
            "CSR / slim",
        ],
        rows=rows,
        note="Zeros inside a table save nothing as it stands (dense bytes); compressed sparse rows (CSR) also store the "
        "column of every number, and a kernel that reads them. Slim models' bytes: the mean of the methods that "
        "remove whole columns, float32, as stored, at the same budget.",
        heads=3,
    )


def tuning_table(grid: Grid) -> Table:
    keys = ["model", "method", "learning_rate", "embedding_l2"]
    settings = grid.results.select(keys).unique(maintain_order=True)
    trials = grid.trials.filter(pl.col("variant") == "")
    best = trials.group_by(keys).agg(pl.col("validation_auc").fill_nan(None).max())
    numbers = trials.group_by("model", "method").agg(pl.len().alias("trials"))
    found = settings.join(best, keys, how="left").join(numbers, ["model", "method"], how="left")
    found = ordered(grid, found.with_columns(pl.col("trials").fill_null(0)))
    rows = [
        [
            row["model"],
            row["method"],
            f"{row['learning_rate']:g}",
            f"{row['embedding_l2']:g}",
            text(number(row["validation_auc"]), ".4f"),
            str(row["trials"]),
        ]
        for row in found.rows(named=True)
    ]
    distinct = sorted(set(found["trials"].to_list()))
    spent = (
        f"Every method had {distinct[0]} trials for each model."
        if len(distinct) == 1
        else f"The numbers of trials differ, from {distinct[0]} to {distinct[-1]}: not all are finished."
    )
    return Table(
        id="tuning",
        title="Learning rate and L2 of the embeddings, chosen by validation AUC",
        columns=["Model", "Method", "Learning rate", "L2", "Validation AUC of the trial", "Trials"],
        rows=rows,
        note=f"{spent} Trials see no test data; they are made at {percent(grid.about.tune_budget)} of the parameters.",
        heads=2,
        own=own_rows(rows),
    )
