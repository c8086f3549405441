"""The command line: one thin function a verb. Bad input is one line on stderr and exit code 2.

What needs TorchRec is imported when a verb needs it: it takes seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sseds_rec import cli_compare, cli_forecast, cli_online, cli_prepare, cli_slim
from sseds_rec.data.schema import SplitName
from sseds_rec.errors import PREEMPTED_EXIT, Preempted, UserError, user_message
from sseds_rec.export import Format, dropped_features, export_plan, plan_path, write_export
from sseds_rec.files import read_json, register_stores
from sseds_rec.output import (
    console,
    print_audit,
    print_comparison,
    print_error,
    print_fit,
    print_json,
    print_metrics,
    print_stability,
    silence_libraries,
)
from sseds_rec.stages import STAGES, Stage

if TYPE_CHECKING:
    from sseds_rec.config import Config
    from sseds_rec.pipeline import Pipeline

app = typer.Typer(
    help="Find which embedding columns of a TorchRec model matter, and cut the others under an exact budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_prepare.app, name="prepare")
app.command()(cli_forecast.forecast)
app.command()(cli_compare.compare)
app.command()(cli_online.online)

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the experiment.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Config values to change, e.g. search.budget.parameters=0.05."),
]
RunDir = Annotated[Path | None, typer.Option(help="Where the run lives; runs/<name> if not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable line last.")]
Rerun = Annotated[bool, typer.Option("--rerun", help="Do it again, and drop the results of the stages after it.")]
Paper = Annotated[
    bool, typer.Option("--paper", help="The paper's search: snip, one training batch, raw ranking, stop at the budget.")
]


@app.command()
def train(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, rerun: Rerun = False, as_json: Json = False
) -> None:
    """Pretrain the full model."""
    _run_stage("pretrain", _config(config, overrides), run_dir, rerun, as_json)


@app.command()
def search(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    paper: Paper = False,
    rerun: Rerun = False,
    as_json: Json = False,
) -> None:
    """Score the pretrained model's columns and allocate the budget: saliency.npz, plan.json."""
    _run_stage("search", _config(config, overrides, paper), run_dir, rerun, as_json)


@app.command()
def audit(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    columns: Annotated[int, typer.Option(min=2, help="How many columns to leave out, one at a time.")] = 64,
    batches: Annotated[int, typer.Option(min=1, help="Validation batches to do it on.")] = 8,
    paper: Paper = False,
    as_json: Json = False,
) -> None:
    """Check the scores against exact leave-one-out: mask single columns and evaluate again."""
    with _pipeline(_config(config, overrides, paper), run_dir, None, "audit", "search") as (pipeline, main):
        found = pipeline.audit(columns, batches)
        if main:
            path = pipeline.run.path("search", "audit.json")
            print_audit(found, pipeline.criterion)
            console.print(f"audit: wrote {path}")
            figures = {key: value for key, value in found.as_dict().items() if key != "columns"}
            print_json(as_json, {"verb": "audit", "run_dir": str(pipeline.run.folder), "audit": str(path), **figures})


@app.command()
def slim(
    config: Annotated[str, typer.Argument(metavar="CONFIG|SRC", help="YAML file of the experiment, or a checkpoint.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...|DST", help="Config values to change, or what to make.")
    ] = None,
    run_dir: RunDir = None,
    paper: Paper = False,
    rerun: Rerun = False,
    plan: Annotated[
        Path | None, typer.Option(help="Convert the checkpoint SRC, of any model, to this plan.json's widths: DST.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --plan, how many convert; by default what is worth it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Gather the plan's columns into a slim checkpoint, and measure it before retraining.

    With --plan: sseds slim SRC DST --plan plan.json converts any checkpoint or file of weights.
    """
    if plan:
        cli_slim.convert_checkpoint(
            [config, *(overrides or [])],
            plan,
            processes,
            as_json,
            {"--run-dir": run_dir is not None, "--paper": paper, "--rerun": rerun},
        )
    elif processes:
        raise UserError("--processes goes with --plan: sseds slim SRC DST --plan plan.json")
    else:
        if Path(config).is_dir():
            raise UserError(f"{config}: is a folder; to convert a checkpoint: sseds slim SRC DST --plan plan.json")
        _run_stage("slim", _config(config, overrides, paper), run_dir, rerun, as_json)


@app.command()
def retrain(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    paper: Paper = False,
    rerun: Rerun = False,
    as_json: Json = False,
) -> None:
    """Train the slim model from the winning ticket, or from another start (retrain.tables, dense, transform)."""
    _run_stage("retrain", _config(config, overrides, paper), run_dir, rerun, as_json)


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    paper: Paper = False,
    rerun_from: Annotated[Stage | None, typer.Option(help="Do this stage and those after it again.")] = None,
    as_json: Json = False,
) -> None:
    """Do all stages: pretrain, search, slim, retrain, report. Goes on where it stopped."""
    _run_stages("run", _config(config, overrides, paper), run_dir, STAGES, rerun_from, as_json)


@app.command()
def report(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, paper: Paper = False, as_json: Json = False
) -> None:
    """Write the report page of a finished run anew."""
    with _pipeline(_config(config, overrides, paper), run_dir, None, "report", "retrain") as (pipeline, main):
        pipeline.report()
        if main:
            page = pipeline.run.path("report", "index.html")
            console.print(f"report: wrote {page}")
            print_json(as_json, {"verb": "report", "run_dir": str(pipeline.run.folder), "report": str(page)})


@app.command()
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    stage: Annotated[Literal["pretrain", "retrain"], typer.Option(help="Which trained model.")] = "retrain",
    split: Annotated[SplitName, typer.Option(help="On which rows.")] = "test",
    paper: Paper = False,
    as_json: Json = False,
) -> None:
    """Quality and inference speed of a trained model on a split."""
    with _pipeline(_config(config, overrides, paper), run_dir, None, "evaluate", stage) as (pipeline, main):
        metrics = pipeline.evaluate(stage, split)
        if main:
            print_metrics(f"{stage} on {split}", metrics)
            print_json(
                as_json,
                {
                    "verb": "evaluate",
                    "run_dir": str(pipeline.run.folder),
                    "stage": stage,
                    "split": split,
                    **metrics,
                },
            )


@app.command()
def export(
    plan: Annotated[str, typer.Argument(metavar="PLAN_OR_RUN", help="A plan.json, or a run directory that has one.")],
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="torchrec: EmbeddingBagConfig fields, JSON. fuxictr: use_features and feature_specs, YAML. easyrec: "
            "TorchEasyRec's feature_configs, JSON. Widths are as kept for fuxictr; for the others as FBGEMM's kernels store "
            "them, multiples of 4.",
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="File to write; stdout if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Write a plan's tables and widths as another system takes them."""
    path = plan_path(plan)
    from sseds_rec.search.plan import DimensionPlan

    found = DimensionPlan.load(path)
    text = export_plan(found, form)
    if output:
        write_export(text, output, path)
        console.print(f"export: wrote {output}")
    else:
        print(text, end="")
    written = str(output) if output else None
    line = {"verb": "export", "plan": path, "format": form, "output": written, "dropped": dropped_features(found)}
    print_json(as_json, line)


def main() -> None:
    """Entry point of `sseds` and `python -m sseds_rec`."""
    silence_libraries()
    try:
        register_stores()
        sys.exit(_run() or 0)
    except Preempted:  # the trainer has said so
        sys.exit(PREEMPTED_EXIT)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if _others_wait():
            from sseds_rec.distributed.failures import end_job

            end_job(error)
        message = user_message(error)
        if message is None:
            raise
        print_error(message)
        sys.exit(2)


def _others_wait() -> bool:
    """Whether this process is one of a job's, which its verb would have joined."""
    is_rank = "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return is_rank and sys.argv[1:2] not in (["prepare"], ["export"], ["forecast"])


def _run() -> int | None:
    try:
        code: int | None = app(standalone_mode=False)
        return code
    except typer.exceptions.TyperException as error:
        raise UserError(f"{error.format_message()}; see --help") from None


def _config(path: str, overrides: list[str] | None, paper: bool = False) -> Config:
    from sseds_rec.config import load_config

    return load_config(path, overrides, paper)


@contextmanager
def _pipeline(
    config: Config, run_dir: Path | None, rerun_from: str | None, verb: str, needs: Stage | None
) -> Iterator[tuple[Pipeline, bool]]:
    """The opened run of a config, and whether this process is the one that prints; refuses if the stage `needs` is undone."""
    from sseds_rec.distributed.runtime import runtime
    from sseds_rec.harness import pipeline_for
    from sseds_rec.run_directory import RunDirectory

    with runtime(config.device) as place:
        pipeline = pipeline_for(config, RunDirectory(run_dir or Path("runs") / config.name), place)
        if needs:
            pipeline.run.require(verb, needs)
        pipeline.run.open(config, place, rerun_from)
        yield pipeline, place.is_main


def _run_stage(stage: Stage, config: Config, run_dir: Path | None, rerun: bool, as_json: bool) -> None:
    verb = "train" if stage == "pretrain" else stage
    _run_stages(verb, config, run_dir, (stage,), stage if rerun else None, as_json)


def _run_stages(
    verb: str, config: Config, run_dir: Path | None, stages: tuple[Stage, ...], rerun_from: str | None, as_json: bool
) -> None:
    from sseds_rec.harness import PIPELINES

    needs = PIPELINES[config.search.method].needs.get(stages[0])
    with _pipeline(config, run_dir, rerun_from, verb, needs) as (pipeline, main):
        folder = pipeline.run.folder
        # One rank looks: others may see a shared folder as it was.
        todo = pipeline.runtime.from_main(lambda: [stage for stage in stages if not pipeline.run.done(stage)])
        for stage in todo:
            getattr(pipeline, stage)()
            if main:
                console.print(f"{stage}: wrote {pipeline.run.path(stage)}")
            if main and stage == "search":
                print_fit(read_json(pipeline.run.path(stage, "metrics.json")))
                print_stability(read_json(pipeline.run.path(stage, "metrics.json")))
        if not main:
            return
        if not todo:
            flag = "--rerun-from STAGE" if verb == "run" else "--rerun"
            console.print(f"{folder}: {', '.join(stages)} already done, nothing to do ({flag} does it again)")
        metrics = read_json(pipeline.run.path("metrics.json"))
        if verb in ("run", "retrain") and "pretrain" in metrics:  # some methods can do without
            print_comparison(metrics["pretrain"], metrics["retrain"])
        if pipeline.run.done("report"):
            console.print(f"report: {pipeline.run.path('report', 'index.html')}")
        print_json(as_json, {"verb": verb, "run_dir": str(folder), "done": todo, "metrics": metrics})
