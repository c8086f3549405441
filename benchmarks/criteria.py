"""Every criterion on a trained model: `python benchmarks/criteria.py CONFIG --run-dir RUN [KEY=VALUE ...]`.

The run must be pretrained (`sseds train CONFIG --run-dir RUN`). For each criterion and number of batches of the validation split
it prints what the plan is worth before any retraining (test AUC with the dropped columns masked), what two plans from different
draws have in common, and how many fields are dropped; on synthetic sets also how the widths compare with the planted ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score
from torchrec.distributed.model_parallel import DistributedModelParallel

from sseds_rec.config import load_config
from sseds_rec.data.truth import Truth
from sseds_rec.distributed.runtime import runtime
from sseds_rec.pipeline import Pipeline
from sseds_rec.run_directory import RunDirectory
from sseds_rec.search.criteria import CRITERIA, criterion_named
from sseds_rec.search.masks import keep_only
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.saliency import score_dimensions
from sseds_rec.search.stability import expected_overlap
from sseds_rec.search.tap import tapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 32, 0], help="0: all of the validation split")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    with runtime("cpu") as place:
        pipeline = Pipeline(config, RunDirectory(arguments.run_dir), place)
        model = pipeline.pretrained()
        path = Path(config.data.path)
        truth = Truth.load(path) if (path / "truth.json").exists() else None
        print(f"full model: test AUC {masked_auc(pipeline, model, None):.4f}")
        heads = ["criterion", "batches", "masked AUC", "overlap", "expected", "fields dropped"]
        heads += ["noise dims", "dropped, planted", "rank correlation"] if truth else []
        print("| " + " | ".join(heads) + " |")
        print("|" + "---|" * len(heads), flush=True)
        for name in arguments.criteria:
            for number in arguments.batches:
                print("| " + " | ".join(row(pipeline, model, name, number, truth)) + " |", flush=True)


def row(pipeline: Pipeline, model: DistributedModelParallel, name: str, number: int, truth: Truth | None) -> list[str]:
    search = pipeline.config.search
    plans = []
    expected = float("nan")
    for draw in range(2):
        loader = pipeline.scoring_batches()
        loader.set_epoch(draw)
        scores = score_dimensions(
            model,
            loader,
            criterion_named(name, draw),
            number or None,
            rounds=search.rounds,
            budget=search.budget,
            allocation=search.allocate,
        )
        plans.append(search.allocate(scores, search.budget))
        if not draw:
            expected = expected_overlap(scores, lambda drawn: search.allocate(drawn, search.budget))
    plan = plans[0]
    widths = plan.dims()
    cells = [
        name,
        str(number or "all"),
        f"{masked_auc(pipeline, model, plan):.4f}",
        f"{overlap(*plans):.2f}" if number else "",
        f"{expected:.2f}",
        str(sum(not width for width in widths.values())),
    ]
    return cells + (planted(widths, truth) if truth else [])


def overlap(a: DimensionPlan, b: DimensionPlan) -> float:
    """What two plans have in common, as a share of their mean number of columns: columns, or, where tables are rotated, cos² of
    the angles between the subspaces that they keep."""
    common = 0.0
    for name, own in a.tables.items():
        if name in a.rotations and name in b.rotations:
            bases = [torch.linalg.qr(plan.rotations[name].forward).Q for plan in (a, b)]
            common += float((bases[0].T @ bases[1]).square().sum())
        else:
            common += len({*own.kept} & {*b.tables[name].kept})
    return 2 * common / (sum(a.dims().values()) + sum(b.dims().values()))


def masked_auc(pipeline: Pipeline, model: DistributedModelParallel, plan: DimensionPlan | None) -> float:
    """Test AUC with what the plan drops masked."""
    found = []
    with tapped(model) as taps, torch.no_grad():
        if plan:
            taps.edits |= {name: keep_only(plan, name) for name in plan.tables}
        for batch in pipeline.loader("test"):
            taps.clear()
            _, (_, logits, labels) = model(batch)
            found.append((logits, labels))
    logits, labels = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return float(roc_auc_score(labels, logits))


def planted(widths: dict[str, int], truth: Truth) -> list[str]:
    """Columns of noise, planted fields without any, Spearman's correlation of widths and ranks; duplicates are one field."""
    twins = {one.duplicate_of: one.name for one in truth.fields if one.duplicate_of}
    originals = [one for one in truth.fields if not one.duplicate_of]
    own = {one.name: widths[one.name] + widths.get(twins.get(one.name, ""), 0) for one in originals}
    noise = sum(own[one.name] for one in originals if not one.rank)
    dropped = [one.name for one in originals if one.rank and not own[one.name]]
    both = torch.stack(
        [torch.tensor([float(own[o.name]) for o in originals]), torch.tensor([float(o.rank) for o in originals])]
    )
    correlation = torch.corrcoef(torch.stack([average_ranks(values) for values in both]))[0, 1]
    return [str(noise), ", ".join(dropped) or "none", f"{float(correlation):.2f}"]


def average_ranks(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([(values < v).sum() + (values == v).sum() / 2 for v in values])


if __name__ == "__main__":
    main()
