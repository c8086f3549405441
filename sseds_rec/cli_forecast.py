"""`sseds forecast`: what a model, and its slim model, would take of a cluster that is not here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from sseds_rec.constants import WIDEST
from sseds_rec.distributed.hardware import Cluster, binary_unit, show_size
from sseds_rec.errors import UserError
from sseds_rec.footprint import Optimizer, Precision
from sseds_rec.output import console, print_json

if TYPE_CHECKING:
    from sseds_rec.distributed.capacity import Forecast

_FORMS = (".svg", ".png", ".pdf")
_BAR = 40  # characters, so that a line has 80
_PARTS = {
    "weights": "weights",
    "optimizer": "optimizer states",
    "lookups": "ids, embeddings, caches",
    "dense": "dense part",
    "margin": "margin",
}
_PHASES = {
    "fwd_compute": "forward compute",
    "fwd_comms": "forward comms",
    "bwd_compute": "backward compute",
    "bwd_comms": "backward comms",
}


def forecast(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|SCHEMA",
            help="YAML of an experiment; or a prepared set, its schema.json, or a JSON list of tables as `sseds export` has.",
        ),
    ],
    cluster: Annotated[
        str, typer.Option(help="NODES x DEVICES x DEVICE, as in 4x8xH100-80GB or 2x8xhbm=96GB,hbm_bw=4000GB/s.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config values to change.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="plan.json of a search: forecast the slim model too.")] = None,
    embedding_dim: Annotated[int | None, typer.Option(min=1, max=WIDEST, help="Of tables that do not say it.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows a step of each GPU, for lists of tables; 2048 if not given.")
    ] = None,
    optimizer: Annotated[
        Optimizer | None, typer.Option(help="Of the tables, for lists of tables; adam if not given.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Of the weights, for lists of tables; fp32 if not given.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw memory per rank: an .svg, .png or .pdf file.")] = None,
    save_plans: Annotated[
        Path | None, typer.Option(help="Folder for the sharding plans, for sharding.base_plan and sharding.slim_plan.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one machine-readable line last.")] = False,
) -> None:
    """Plan a model for a cluster without a GPU: fits or not, memory per rank, the smallest cluster, before and after a cut."""
    where = Cluster.parse(cluster)
    if figure and figure.suffix.lower() not in _FORMS:
        raise UserError(f"--figure {figure}: the name ends in none of {', '.join(_FORMS)}")
    if figure and not figure.parent.is_dir():
        raise UserError(f"--figure {figure}: there is no folder {figure.parent}; make it first")
    if save_plans and not save_plans.is_dir():
        raise UserError(f"--save-plans {save_plans}: there is no such folder; make it first")
    from sseds_rec.distributed.capacity import forecast as plan_for_cluster
    from sseds_rec.distributed.plan_file import plan_file, save_plan
    from sseds_rec.forecast import TableOptions, workloads

    options = TableOptions(embedding_dim, batch_size, optimizer, precision)
    base, slim = workloads(source, overrides or [], plan, options, where)
    models = {"base": base} | ({"slim": slim} if slim else {})
    found = {name: plan_for_cluster(own, where) for name, own in models.items()}
    _print(found, where)
    if figure:
        _draw(found, where, figure)
        console.print(f"forecast: wrote {figure}")
    for name, own in found.items():
        if save_plans and own.fits:
            path = save_plans / f"{name}_sharding_plan.json"
            save_plan(path, plan_file(own.placement.plan, models[name].model, where.world_size, where.per_node))
            console.print(f"forecast: wrote {path}")
    line: dict[str, Any] = {name: own.as_dict() for name, own in found.items()}
    line |= {"ratio": _ratios(found)} if slim else {}
    print_json(as_json, {"verb": "forecast", "cluster": str(where), "plan": plan and str(plan), **line})


def _ratios(found: dict[str, Forecast]) -> dict[str, float | None]:
    """Base to slim, how many times as much."""
    base, slim = found["base"], found["slim"]
    devices = [own.smallest.world_size if own.smallest else None for own in (base, slim)]
    times = [sum(own.placement.step.values()) for own in (base, slim)]
    return {
        "table_bytes": (base.weight_bytes + base.optimizer_bytes) / (slim.weight_bytes + slim.optimizer_bytes),
        "step": times[0] / times[1] if times[1] else None,
        "devices": devices[0] / devices[1] if devices[0] and devices[1] else None,
    }


def _print(found: dict[str, Forecast], where: Cluster) -> None:
    unit, _ = binary_unit(where.device.memory)
    on_gpu = where.device.kind == "cuda"
    console.print(escape(f"Forecast for {where}: {where.world_size} ranks of {show_size(where.device.memory)}"))
    table = Table()
    table.add_column("", overflow="fold")  # never an ellipsis: in a pipe it would be lost
    for name in [*found, "base/slim"] if len(found) == 2 else found:
        table.add_column(name, justify="right", overflow="fold")
    ratios = _ratios(found) if len(found) == 2 else {}

    def row(label: str, show: Callable[[Forecast], str], ratio: str = "") -> None:
        times = [f"{ratios[ratio]:.2f}" if ratios.get(ratio) else ""] if ratios else []
        table.add_row(label, *(escape(show(own)) for own in found.values()), *times)

    row("fits", lambda own: "yes" if own.fits else f"no: {show_size(own.over)} over")
    row("tables", lambda own: f"{own.tables:,}")
    row("rows a step and rank", lambda own: f"{own.batch_size:,}")
    row("weights", lambda own: show_size(own.weight_bytes))
    row("weights and optimizer", lambda own: show_size(own.weight_bytes + own.optimizer_bytes), "table_bytes")
    table.add_section()
    row(f"{unit} a rank", lambda own: "min mean max")
    row("HBM" if on_gpu else "memory", lambda own: _spread(own, "memory"))
    for part, label in _PARTS.items():
        if on_gpu or part != "margin":
            row(f"  {label}", lambda own, part=part: _spread(own, part))  # type: ignore[misc]
    if on_gpu:
        row("DDR", lambda own: _spread(own, "ddr"))
    table.add_section()
    row("embedding step, ms *", lambda own: f"{sum(own.placement.step.values()):.2f}", "step")
    for phase, label in _PHASES.items():
        row(f"  {label}", lambda own, phase=phase: f"{own.placement.step[phase]:.2f}")  # type: ignore[misc]
    table.add_section()
    row("sharding types", lambda own: _counts(own.placement.sharding_types))
    row("kernels", lambda own: _counts(own.placement.kernels))
    row("smallest cluster", _smallest)
    row("devices", lambda own: f"{own.smallest.world_size}" if own.smallest else "", "devices")
    console.print(table)
    if not all(own.fits for own in found.values()):
        console.print(
            "What does not fit is shown as on as many devices with just enough memory; over: its fullest rank."
        )
    console.print(
        "* by the planner's model of the device, the longest rank's in each phase: an estimate, not a measurement"
    )
    _print_bars(found, where)


def _print_bars(found: dict[str, Forecast], where: Cluster) -> None:
    """The fullest rank of each model, on one scale."""
    from sseds_rec.report.memory import parts_in

    parts = parts_in([own.placement.memory for own in found.values()])
    most = max(where.device.memory, *(int(own.placement.used.max()) for own in found.values()))
    limit = round(_BAR * where.device.memory / most)
    for name, own in found.items():
        placement = own.placement
        fullest = int(placement.used.argmax())
        bar, end = "", 0.0
        for part, (_, color) in parts.items():
            end += float(placement.memory[part][fullest])
            bar += f"[{color}]" + "█" * (round(_BAR * end / most) - bar.count("█")) + "[/]"
        console.print(f"{name:>5} {bar}{' ' * (_BAR - bar.count('█'))} fullest rank, {show_size(placement.used.max())}")
    console.print(f"{'':>5} {' ' * (limit - 1)}▲ the device has {show_size(where.device.memory)}")
    console.print("  ".join(f"[{color}]█[/] {_PARTS[part]}" for part, (_, color) in parts.items()), soft_wrap=False)


def _draw(found: dict[str, Forecast], where: Cluster, path: Path) -> None:
    from sseds_rec.report.memory import Panel, memory_per_rank
    from sseds_rec.report.svg import write_figure

    panels = []
    for name, own in found.items():
        verdict = "fits" if own.fits else f"does not fit, the fullest rank is {show_size(own.over)} over"
        needs = f"smallest cluster: {_smallest(own)}"
        panels.append(Panel(f"{name} on {where}: {verdict}; {needs}", own.placement.memory))
    write_figure(path, lambda: memory_per_rank(panels, where.device.memory, where.per_node))


def _smallest(own: Forecast) -> str:
    from sseds_rec.distributed.capacity import largest_cluster

    return f"{own.smallest or f'more than {largest_cluster(own.placement.cluster)}'}"


def _spread(own: Forecast, name: str) -> str:
    placement = own.placement
    sizes = {"memory": placement.used, "ddr": placement.ddr, **placement.memory}[name]
    _, unit = binary_unit(placement.cluster.device.memory)
    return " ".join(_number(size / unit) for size in (sizes.min(), sizes.mean(), sizes.max()))


def _counts(counts: dict[str, int]) -> str:
    return "\n".join(f"{number} {name}" for name, number in counts.items())


def _number(size: float) -> str:
    return f"{size:,.1f}" if size >= 0.05 or not size else f"{size:.1g}"
