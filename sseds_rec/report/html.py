"""Write `report/index.html`: the artefacts of a run, as one page that needs nothing but itself."""

import math
import shlex
from pathlib import Path
from typing import Any

from sseds_rec.constants import STABLE
from sseds_rec.distributed.hardware import show_size
from sseds_rec.report.artefacts import BYTES_PER_PARAMETER, MIB, Run, read_run
from sseds_rec.report.blocks import placement_block, quality_block, search_blocks, training_blocks
from sseds_rec.report.numbers import count, number, percent, text
from sseds_rec.report.placement import read_placements
from sseds_rec.report.templates import render_template, write_page

_WORDS = {0.5: "Half", 0.25: "A quarter", 0.2: "A fifth", 0.1: "A tenth", 0.05: "A twentieth", 0.01: "A hundredth"}


def write_report(run_dir: Path) -> Path:
    """Write the report of a finished run and return its path, `run_dir/report/index.html`.

    Raises:
        UserError: an artefact of the run is missing or cannot be read; names the file. Nothing is written then.
    """
    return write_page(run_dir / "report" / "index.html", render(read_run(run_dir)))


def render(run: Run) -> str:
    """The page as HTML text."""
    placements = read_placements(run)
    return render_template(
        "report.html.j2",
        name=str(run.config.get("name", run.directory.name)),
        headline=_headline(run),
        summary=_summary(run),
        results=_results(run),
        notes=_notes(run),
        quality=quality_block(run),
        search=search_blocks(run),
        training=training_blocks(run),
        tables=sorted(run.tables, key=lambda table: -table.parameters_before),
        placements=placements,
        per_rank=placement_block(placements) if placements and placements.base.ranks > 1 else None,
        padded=any(table.stored_dim != table.dim for table in run.tables),
        commands=_commands(run),
        config_text=run.config_text,
        environment=run.environment,
    )


def _fraction_in_words(fraction: float) -> str:
    for value, word in _WORDS.items():
        if 0.97 * value <= fraction <= value:
            return word
    return percent(fraction)


def _headline(run: Run) -> str:
    base, slim = (number(run.metrics[stage].get("auc")) for stage in ("pretrain", "retrain"))
    fraction = _fraction_in_words(run.plan["reached"]["parameters"]["fraction"])
    change = text(slim - base, "+.4f")
    return f"{fraction} of the embedding parameters, test AUC {text(base, '.4f')} → {text(slim, '.4f')} ({change})"


def _summary(run: Run) -> list[str]:
    """Sentences below the headline: what was trained, what was asked, what the search found and took."""
    reached, settings, search = run.plan["reached"], run.plan.get("search", {}), run.metrics.get("search", {})
    model = run.config.get("model", {}).get("name", "The model")
    path = run.config.get("data", {}).get("path")
    widths = sorted({table.original_dim for table in run.tables})
    width = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
    dropped = sum(table.dim == 0 for table in run.tables)
    budget = ", ".join(f"{kind} {_budget(value)}" for kind, value in run.plan.get("budget", {}).items())
    criterion = " ".join(str(settings[key]) for key in ("method", "criterion") if settings.get(key))
    sentences = [
        f"{model}{f' on {path}' if path else ''}: {len(run.tables):,} fields with embeddings of width {width}.",
        (
            f"Budget asked: {budget or 'not recorded'}; reached: {percent(reached['parameters']['fraction'])} of the "
            f"parameters, {percent(reached['dims']['fraction'])} of the dims; "
            f"{dropped or 'no'} {'field' if dropped == 1 else 'fields'} dropped."
        ),
    ]
    if memory := reached.get("memory_per_rank"):
        fullest, has = show_size(memory["max"]), show_size(memory["of"])
        sentences.append(f"The planner's fullest rank takes {fullest} of {has} there, margin and all.")
    if not math.isnan(seconds := number(search.get("seconds"))):
        sentences.append(
            f"The search{f' ({criterion})' if criterion else ''} took {text(seconds, ',.2f')} s "
            f"on {count(search.get('batches'))} batches."
        )
    if not math.isnan(overlap := number(search.get("expected_overlap"))):
        advice = (
            "" if overlap >= STABLE else "; more batches are needed for a plan that holds (search.num_batches=auto)"
        )
        sentences.append(
            f"Had the batches been others, {percent(round(overlap, 3))} of the kept dims would be the same{advice}."
        )
    if run.audit:
        correlation, regret = (number(run.audit.get(key)) for key in ("rank_correlation", "regret"))
        lost = (
            f", and the highest scores among them avoid {percent(round(1 - regret, 3))} of the loss that the best would"
        )
        sentences.append(
            f"Left out one at a time, {len(run.audit.get('columns', []))} dims ranked by what the loss then was agree with the "
            f"scores by a rank correlation of {text(correlation, '.2f')}{'' if math.isnan(regret) else lost}."
        )
    return sentences


def _budget(value: Any) -> str:
    if isinstance(value, float) and value <= 1:
        return percent(value)
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def _results(run: Run) -> list[tuple[str, str, str, str]]:
    """Rows (quantity, base, slim, change): absolute change for the metrics, relative change for the costs."""

    def row(title: str, key: str, form: str, scale: float = 1.0, relative: bool = True) -> tuple[str, str, str, str]:
        base, slim = (number(run.metrics[stage].get(key)) / scale for stage in ("pretrain", "retrain"))
        if not relative:
            change = text(slim - base, "+" + form)
        else:
            change = text(slim / base - 1, "+.1%").replace("%", "\N{NO-BREAK SPACE}%") if base else "–"
        return title, text(base, form), text(slim, form), change

    base, slim = (run.metrics[stage].get("group_field") for stage in ("pretrain", "retrain"))
    grouped = [row(f"Test GAUC by {base}", "gauc", ".4f", relative=False)] if base and base == slim else []
    return [
        row("Test AUC", "auc", ".4f", relative=False),
        *grouped,
        row("Test logloss", "logloss", ".4f", relative=False),
        row("Test calibration", "calibration", ".4f", relative=False),
        row("Embedding parameters", "embedding_parameters", ",.0f"),
        row("All parameters", "parameters", ",.0f"),
        row("Embedding memory (MiB, float32)", "embedding_parameters", ",.2f", scale=MIB / BYTES_PER_PARAMETER),
        row("Training time (s)", "seconds", ",.1f"),
        row("Training speed (samples/s)", "samples_per_second", ",.0f"),
        row("Inference speed (samples/s)", "inference_samples_per_second", ",.0f"),
    ]


def _notes(run: Run) -> list[str]:
    notes = [
        (
            f"One run with one seed ({run.config.get('seed', 'not recorded')}). "
            "A difference in AUC of about 0.001 can come from the seed alone; repeat with other seeds before "
            "relying on it."
        )
    ]
    if isinstance(untrained := run.metrics.get("slim"), dict):
        auc, logloss = (text(number(untrained.get(key)), ".4f") for key in ("auc", "logloss"))
        notes.append(f"The slim model before retraining: test AUC {auc}, logloss {logloss}.")
    stored = sum(table.rows * (table.stored_dim - table.dim) for table in run.tables)
    if stored:
        notes.append(f"The kernels pad widths: {count(stored)} stored parameters beyond the searched ones.")
    searched = sum(table.parameters_before for table in run.tables)
    counted = number(run.metrics["pretrain"].get("embedding_parameters"))
    if not math.isnan(counted) and counted != searched:
        notes.append(
            f"The search had {count(searched)} of the base model's {count(counted)} embedding parameters to choose "
            "from (first-order weights, for example, are no dims); the figures and the plan count those."
        )
    return notes


def _commands(run: Run) -> list[str]:
    config, again = (shlex.quote(str(run.directory / "config.yaml")), shlex.quote(f"{run.directory}-again"))
    processes = run.environment.get("world_size", 1)
    launcher = "sseds" if processes == 1 else f"torchrun --nproc-per-node {processes} -m sseds_rec"
    return [
        f"{launcher} run {config} --run-dir {again}",
        f"sseds report {config} --run-dir {shlex.quote(str(run.directory))}",
    ]
