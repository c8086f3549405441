"""Base against slim on flights over several seeds: `python benchmarks/flights.py --seeds 2022 2023 2024 [KEY=VALUE ...]`.

Each seed is a run of its own, sequential, so that the ratios of one row are from one run on one machine. Finished runs are
not repeated. Prints a Markdown table of test metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--config", default="configs/flights_deepfm.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2022, 2023, 2024])
    parser.add_argument("--output", type=Path, default=Path("runs/flights_seeds"))
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        folder = arguments.output / f"seed{seed}"
        command = [sys.executable, "-m", "sseds_rec", "run", arguments.config, f"seed={seed}", *arguments.overrides]
        subprocess.run([*command, "--run-dir", folder], check=True, stdout=subprocess.DEVNULL)
        results.append(json.loads((folder / "metrics.json").read_text()))
    print("| seed | base AUC | slim, not retrained | slim AUC | change | reached | train time | samples/s |")
    print("|---|---|---|---|---|---|---|---|")
    for seed, result in zip(arguments.seeds, results, strict=True):
        base, slim = result["pretrain"], result["retrain"]
        print(
            f"| {seed} | {base['auc']:.4f} | {result['slim']['auc']:.4f} | {slim['auc']:.4f} | {slim['auc'] - base['auc']:+.4f} "
            f"| {result['search']['reached']['parameters']['fraction']:.4f} | {slim['seconds'] / base['seconds']:.2f}x "
            f"| {slim['samples_per_second'] / base['samples_per_second']:.2f}x |"
        )
    change = statistics.mean(result["retrain"]["auc"] - result["pretrain"]["auc"] for result in results)
    print(f"\nMean change of test AUC: {change:+.4f}")


if __name__ == "__main__":
    main()
