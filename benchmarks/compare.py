"""The tables of compare.md, of folders that `sseds compare` left: `python benchmarks/compare.py runs/flights_compare ...`."""

from __future__ import annotations

import argparse
from pathlib import Path

import polars as pl

from sseds_rec.compare.statistics import rank_methods
from sseds_rec.report.compare_artefacts import Grid, read_grid
from sseds_rec.report.compare_search import ablation_table
from sseds_rec.report.compare_tables import with_spread


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def header(*cells: str) -> None:
    row(*cells)
    print("|" + "---|" * len(cells))


def accuracy(results: pl.DataFrame, budgets: list[float]) -> None:
    """Test AUC, mean and deviation of seeds, by model, method and budget."""
    cells = results.group_by("model", "method", "budget").agg(
        pl.col("auc").mean(), pl.col("auc").std().alias("std"), pl.col("missed").any()
    )
    found = {(c["model"], c["method"], c["budget"]): c for c in cells.iter_rows(named=True)}
    for model in results["model"].unique(maintain_order=True):
        methods = results.filter(model=model)["method"].unique(maintain_order=True)
        best = {b: max((found[model, m, b]["auc"], m) for m in methods if (model, m, b) in found)[1] for b in budgets}
        print(f"\n{model}\n")
        header("method", *(f"{budget:g}" for budget in budgets))
        for method in methods:
            shown = []
            for budget in budgets:
                cell = found.get((model, method, budget)) or found.get((model, method, None))
                text = with_spread(cell["auc"], cell["std"]) + ("*" if cell["missed"] else "") if cell else ""
                shown.append(f"**{text}**" if method == best[budget] else text)
            row(method, *shown)


def kept(results: pl.DataFrame, budgets: list[float]) -> None:
    """Share of the full model's elements that are left, by method and budget: means over models and seeds."""
    print()
    header("elements left", *(f"{budget:g}" for budget in budgets))
    whole = results.filter(method="full").select("model", "seed", whole="embedding_parameters")
    shares = results.drop_nulls("budget").join(whole, on=["model", "seed"])
    shares = shares.group_by("method", "budget", maintain_order=True).agg(
        (pl.col("embedding_parameters") / pl.col("whole")).mean().alias("share")
    )
    found = {(method, budget): share for method, budget, share in shares.iter_rows()}
    for method in shares["method"].unique(maintain_order=True):
        row(method, *(f"{found[method, b]:.4f}" if (method, b) in found else "" for b in budgets))


def against_ours(results: pl.DataFrame, budgets: list[float]) -> None:
    """Differences of test AUC to `sseds`, paired over models and seeds."""
    print()
    header("method", *(f"{budget:g}: less sseds, 95 % interval, p" for budget in budgets))
    rankings = [rank_methods(results, budget) for budget in budgets]
    for method in results["method"].unique(maintain_order=True):
        shown = []
        for ranking in rankings:
            own = next((ranked.to_chosen for ranked in ranking.methods if ranked.method == method), None)
            shown.append(f"{own.mean:+.4f}, {own.low:+.4f} to {own.high:+.4f}, {own.p:.2g}" if own else "")
        if method != "sseds":
            row(method, *shown)


def ablations(grid: Grid) -> None:
    """The page's table of them, if there are any."""
    table = None if grid.ablations.is_empty() else ablation_table(grid)
    if table is None:
        return
    print()
    header(*table.columns)
    for cells in table.rows:
        row(*(str(cell).replace("<strong>", "**").replace("</strong>", "**") for cell in cells))


def costs(results: pl.DataFrame, budget: float) -> None:
    """Seconds, their ratios and sizes at one budget, means over models and seeds; PEP and AutoDim search once for all budgets."""
    at = results.filter((pl.col("budget") == budget) | pl.col("budget").is_null())
    seconds = ["pretrain_seconds", "search_seconds", "retrain_seconds"]
    columns = [*seconds, "inference_samples_per_second", "stored_parameters"]
    means = at.group_by("method", maintain_order=True).agg(pl.col(columns).mean())
    own = means.filter(method="sseds")["search_seconds"].item()
    print()
    header("method", "pretrain s", "search s", "search / sseds", "retrain s", "rows/s in inference", "stored")
    for cell in means.iter_rows(named=True):
        pretrain, search, retrain, speed, stored = (cell[name] for name in columns)
        shown = f"{pretrain:.1f}", f"{search:.2f}", f"{search / own:.2f}", f"{retrain:.1f}"
        row(cell["method"], *shown, f"{speed:,.0f}", f"{stored:,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        grid = read_grid(folder)
        about = grid.about
        minutes = f"{about.seconds / 60:.0f}" if about.seconds else "?"
        print(f"\n## {folder}\n\n`{about.command}`: {minutes} minutes, {about.environment['cpu']}")
        accuracy(grid.results, about.budgets)
        kept(grid.results, about.budgets)
        against_ours(grid.results, about.budgets)
        ablations(grid)
        costs(grid.results, about.tune_budget)


if __name__ == "__main__":
    main()
