"""`sseds compare`: the methods side by side."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from sseds_rec.errors import UserError
from sseds_rec.files import read_json
from sseds_rec.output import LINE_SECONDS, console, print_json, progress_console

if TYPE_CHECKING:
    from sseds_rec.config import Config


def compare(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the experiment.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config values to change, e.g. train.epochs=2.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="all, or names with commas: sseds,uniform,mde.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Shares of the embedding parameters: 0.5,0.2,0.1,0.05.")] = None,
    models: Annotated[str | None, typer.Option(help="Names with commas: fm,deepfm,wide_deep.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many, from the config's seed on.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; one a core or GPU if not given.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the comparison lives; runs/<name>_compare if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one machine-readable line last.")] = False,
) -> None:
    """Run methods of search, budgets, models and seeds as one grid, each tuned alike; goes on where it stopped."""
    from sseds_rec.config import load_config

    options = {"budgets": budgets, "models": models, "seeds": seeds, "processes": processes}
    given = [f"compare.{key}={_list(value)}" for key, value in options.items() if value is not None]
    if methods is not None:
        given.append(f"compare.methods={methods if methods == 'all' else _list(methods)}")
    _compare(load_config(config, [*(overrides or []), *given]), config, run_dir, as_json)


def _list(value: str | int) -> str | int:
    return f"[{value}]" if isinstance(value, str) else value


def _compare(config: Config, source: str, run_dir: Path | None, as_json: bool) -> None:
    from sseds_rec.compare.folder import open_comparison
    from sseds_rec.compare.grid import Grid
    from sseds_rec.compare.pool import Pool, gpus_of
    from sseds_rec.compare.results import write_results

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sseds compare starts processes of its own (compare.processes); start it as one process")
    folder = run_dir or Path("runs") / f"{config.name}_compare"
    config, facts = open_comparison(folder, config, source)
    grid = Grid(config, folder)
    begun, before = time.monotonic(), facts["seconds"]

    def save() -> None:
        write_results(grid, {**facts, "seconds": before + time.monotonic() - begun})

    pool = Pool(facts["processes"], folder, gpus_of(config))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that workers end with it
    try:
        with _Phases() as phases:
            grid.run(pool, phases, save)
    finally:
        pool.close()
        save()
    _print(folder, as_json)


def _print(folder: Path, as_json: bool) -> None:
    import polars as pl

    from sseds_rec.report.compare import write_compare_report

    page = write_compare_report(folder)
    found = read_json(folder / "compare.json")
    results = pl.read_parquet(folder / "results.parquet").filter(role="result")
    means = results.group_by("model", "method", "budget").agg(pl.col("auc").mean(), pl.col("missed").any())
    for model in found["models"]:
        table = Table(title=f"{model}: test AUC, mean of seeds")
        table.add_column("method")
        columns = [None, *found["budgets"]]
        for budget in columns:
            table.add_column("all" if budget is None else f"{budget:g}", justify="right")
        of_model = {
            (row["method"], row["budget"]): f"{row['auc']:.4f}{'*' if row['missed'] else ''}"
            for row in means.filter(model=model).iter_rows(named=True)
        }
        ran = {method for method, _ in of_model}
        for method in (one for one in dict.fromkeys(["full", *found["methods"]]) if one in ran):
            table.add_row(method, *(of_model.get((method, budget), "") for budget in columns))
        console.print(table)
    if means["missed"].any():
        console.print("* above its budget")
    for cell in found["missing"]:
        console.print(f"no result: {cell['run']}: {cell['why']}")
    console.print(f"compare: wrote {page}")
    names = ("results.parquet", "results.csv", "widths.parquet", "saliency.parquet")
    line = {"verb": "compare", "run_dir": str(folder), "page": str(page), "missing": found["missing"]}
    print_json(as_json, {**line, "files": [str(folder / name) for name in names], "seconds": found["seconds"]})


class _Phases:
    """Shows the phases of a grid: bars on a terminal, a line now and then elsewhere."""

    def __enter__(self) -> _Phases:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=progress_console) if sys.stderr.isatty() else None
        self._tasks: dict[str, TaskID] = {}
        self._last = 0.0
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, phase: str, done: int, cells: int) -> None:
        if self._bars:
            task = self._tasks.get(phase)
            self._tasks[phase] = self._bars.add_task(phase, total=cells) if task is None else task
            self._bars.update(self._tasks[phase], completed=done)
        elif done == cells or time.monotonic() - self._last > LINE_SECONDS:
            self._last = time.monotonic()
            progress_console.print(f"compare: {phase}: {done} of {cells} runs done")
