"""Words and tables for the terminal."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sseds_rec.constants import STABLE
from sseds_rec.distributed.hardware import show_size

if TYPE_CHECKING:
    from sseds_rec.search.audit import Audit

#: Results.
console = Console(highlight=False, soft_wrap=True)

#: What happens until they are there.
progress_console = Console(stderr=True, highlight=False, soft_wrap=True)

#: Between lines of progress when nobody watches a terminal.
LINE_SECONDS = 10.0


def silence_libraries() -> None:
    """Keeps what TorchRec and torch say to their own developers off the user's terminal."""
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # else each store that ends before its last client says so at length
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch(rec)?\.")
    for name in (None, "torchrec.distributed", "torch.fx", "torch.distributed"):  # TorchRec uses the root logger too
        logging.getLogger(name).setLevel(logging.ERROR)


def print_error(message: str) -> None:
    """What a user has to put right, in one line."""
    print(f"sseds: {' '.join(message.split())}", file=sys.stderr)


def print_comparison(base: dict[str, Any], slim: dict[str, Any]) -> None:
    """The table at the end of a run: base | slim | change, on the test split."""
    table = Table(title="Test split, full model against slim model")
    for heading in ("", "base", "slim", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    # An earlier version measured less, and a model that was not retrained has no speed in training.
    both = {key for key in base.keys() & slim.keys() if base[key] is not None and slim[key] is not None}
    field = base.get("group_field")
    grouped = [(f"GAUC by {field}", "gauc")] if field and field == slim.get("group_field") else []
    for label, key in (("AUC", "auc"), *grouped, ("logloss", "logloss")):
        table.add_row(label, f"{base[key]:.4f}", f"{slim[key]:.4f}", f"{slim[key] - base[key]:+.4f}")
    for label, key in (
        ("embedding parameters", "embedding_parameters"),
        ("all parameters", "parameters"),
        ("training seconds", "seconds"),
        ("samples/s in training", "samples_per_second"),
        ("samples/s in inference", "inference_samples_per_second"),
    ):
        if key in both:
            table.add_row(label, f"{base[key]:,.0f}", f"{slim[key]:,.0f}", f"x{slim[key] / base[key]:.3f}")
    console.print(table)


def print_windows(metrics: dict[str, Any]) -> None:
    """The table at the end of `sseds online`: base | slim | change, means over the windows."""
    base, slim = metrics["base"], metrics["slim"]
    table = Table(title=f"Means over {metrics['windows']} windows, each predicted before it is trained on")
    for heading in ("", "base", "slim", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, key in (("AUC", "auc"), ("logloss", "logloss")):
        table.add_row(label, f"{base[key]:.4f}", f"{slim[key]:.4f}", f"{slim[key] - base[key]:+.4f}")
    for label, key in (
        ("embedding parameters in use", "embedding_parameters_in_use"),
        ("embedding parameters, last window", "embedding_parameters"),
        ("seconds, all windows", "seconds"),
    ):
        table.add_row(label, f"{base[key]:,.0f}", f"{slim[key]:,.0f}", f"x{slim[key] / base[key]:.3f}")
    console.print(table)


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """What `evaluate` measured, in one line."""
    gauc = f"  GAUC by {metrics['group_field']} {metrics['gauc']:.6f}" if "gauc" in metrics else ""
    console.print(
        f"{title}: AUC {metrics['auc']:.6f}{gauc}  logloss {metrics['logloss']:.6f}  "
        f"normalized entropy {metrics['normalized_entropy']:.4f}  calibration {metrics['calibration']:.4f}  "
        f"{metrics['samples']:,} rows  {metrics['inference_samples_per_second']:,.0f} samples/s"
    )


def print_stability(search: dict[str, Any]) -> None:
    """How far other batches would have changed the plan, after a search."""
    overlap, batches = search.get("expected_overlap"), search["batches"]
    if overlap is None and batches != 1:  # it took none, or trained on them
        return
    if overlap is None:
        console.print("search: 1 batch; two or more would tell how far others would change the plan")
    else:
        advice = (
            ""
            if overlap >= STABLE
            else "; more rows are needed: search.num_batches=auto, or a larger search.batch_size"
        )
        console.print(f"search: of {batches} batches; others would keep {overlap:.0%} of the same columns{advice}")


def print_fit(search: dict[str, Any]) -> None:
    """After a search for what fits a cluster, what the plan takes there."""
    memory = search["reached"].get("memory_per_rank")
    if memory:
        kept = search["reached"]["dims"]
        cut = (
            "the full model fits, nothing is cut"
            if kept["kept"] == kept["of"]
            else f"{kept['fraction']:.1%} of the columns are kept"
        )
        console.print(
            f"search: {search['budget']['fits']}: {cut}; the fullest rank has {show_size(memory['max'])} "
            f"of {show_size(memory['of'])}, margin and all"
        )


def print_audit(audit: Audit, criterion: str) -> None:
    """What leaving out single columns showed, in a few lines."""
    regret = "undefined" if audit.regret is None else f"{audit.regret:.1%}"
    console.print(
        f"audit: {len(audit.columns)} columns left out one at a time, {audit.samples:,} rows, loss {audit.loss:.6f}\n"
        f"  rank correlation of {criterion} with the loss that a column's absence adds: {audit.rank_correlation:.3f} "
        f"(with its magnitude: {audit.rank_correlation_of_magnitude:.3f})\n"
        f"  regret of the {int(audit.kept.sum())} highest scores: {regret} of what as many best columns are worth\n"
        f"  {audit.significant} of the {len(audit.columns)} differ from no change by two standard errors; the rest is noise"
    )


def print_json(wanted: bool, line: dict[str, Any]) -> None:
    """The machine-readable last line of a verb, if it is wanted."""
    if wanted:
        print(json.dumps(line))
