"""`sseds online`: base and slim model over windows of time, each predicted before it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sseds_rec.errors import UserError
from sseds_rec.files import read_json
from sseds_rec.output import console, print_json, print_windows, progress_console
from sseds_rec.stages import Stage

if TYPE_CHECKING:
    from sseds_rec.online.experiment import Online
    from sseds_rec.online.records import Record

#: Stages of a run that warm both models up, on the first windows.
_WARM_UP: tuple[Stage, ...] = ("pretrain", "search", "slim", "retrain")


def online(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the experiment.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Config values to change, e.g. online.research_every=8."),
    ] = None,
    windows: Annotated[str | None, typer.Option(help="Folder of the windows; data.path if not given.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run lives; runs/<name> if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one machine-readable line last.")] = False,
) -> None:
    """Follow a stream: predict each window of time with base and slim model, then train both on it. Goes on where it stopped."""
    from sseds_rec.config import load_config
    from sseds_rec.distributed.runtime import runtime
    from sseds_rec.online.experiment import Online
    from sseds_rec.online.windows import Windows
    from sseds_rec.report.online import write_online_report
    from sseds_rec.run_directory import RunDirectory

    settings = load_config(config, [*(overrides or []), *([f"data.path={windows}"] if windows else [])])
    if settings.data.format != "sseds":
        raise UserError(f"data.format={settings.data.format}: windows are sets that `sseds prepare` wrote")
    run = RunDirectory(run_dir or Path("runs") / settings.name)
    with runtime(settings.device) as place:
        found = place.from_main(lambda: Windows(settings.data.path))
        experiment = Online(settings, found, run, place)
        experiment.begin()
        _warm_up(experiment)
        experiment.follow(_show if place.is_main else lambda base, slim: None)
        page = run.path("report", "online.html")
        place.on_main(lambda: write_online_report(run.folder))
        if place.is_main:
            metrics = read_json(run.path("online", "metrics.json"))
            print_windows(metrics)
            console.print(f"online: wrote {run.path('online')}")
            console.print(f"report: {page}")
            print_json(as_json, {"verb": "online", "run_dir": str(run.folder), "report": str(page), "metrics": metrics})


def _warm_up(experiment: Online) -> None:
    run, place = experiment.run, experiment.runtime
    for stage in place.from_main(lambda: [own for own in _WARM_UP if not run.done(own)]):
        getattr(experiment, stage)()
        if place.is_main:
            console.print(f"{stage}: wrote {run.path(stage)}")


def _show(base: Record, slim: Record) -> None:
    progress_console.print(
        f"{base.window}: {base.rows:,} rows  AUC {base.auc:.4f} -> {slim.auc:.4f}  "
        f"logloss {base.logloss:.4f} -> {slim.logloss:.4f}{'  searched again' if slim.searched else ''}"
    )
