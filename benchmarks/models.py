"""All models on two real sets: `python benchmarks/models.py --census census_income_99762.csv.gz`.

Prepares flights and the test half of UCI's Census-Income (KDD) unless they are there, runs all stages for each model on each
set, and prints a Markdown table a set. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

#: Attributes of the file, in its order (census-income.names); `instance_weight` is no field, `income` is the label.
CENSUS_COLUMNS = """age class_of_worker industry_code occupation_code education wage_per_hour enrolled_in_education
marital_status major_industry major_occupation race hispanic_origin sex union_member reason_for_unemployment employment_status
capital_gains capital_losses dividends tax_filer_status previous_region previous_state household_family_stat
household_summary instance_weight migration_msa migration_reg migration_within_reg same_house_1_year_ago
migration_prev_sunbelt num_persons_worked_for_employer family_members_under_18 father_country mother_country self_country
citizenship own_business_or_self_employed veterans_questionnaire veterans_benefits weeks_worked year income""".split()  # noqa: SIM905
NUMERIC = ["age", "wage_per_hour", "capital_gains", "capital_losses", "dividends", "weeks_worked"]
MODELS = ["fm", "wide_deep", "deepfm", "dnn", "dlrm", "dcnv2"]


def sseds(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "sseds_rec", *arguments], check=True, stdout=subprocess.DEVNULL)


def prepare(census: Path) -> None:
    if not Path("data/flights/schema.json").exists():
        sseds("prepare", "flights", "--output", "data/flights")
    if not Path("data/census/schema.json").exists():
        categorical = [n for n in CENSUS_COLUMNS if n not in (*NUMERIC, "instance_weight", "income")]
        names = ["--columns", ",".join(CENSUS_COLUMNS), "--label", "income", "--positive", "50000+."]
        fields = ["--categorical", ",".join(categorical), "--numeric", ",".join(NUMERIC)]
        sseds("prepare", "table", "--input", census, "--output", "data/census", *names, *fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--census", type=Path, required=True, help="census_income_99762.csv.gz")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sets", nargs="+", default=["flights", "census"])
    parser.add_argument("--output", type=Path, default=Path("runs/models"))
    arguments = parser.parse_args()
    prepare(arguments.census)
    for name in arguments.sets:
        print(f"\n{name}\n")
        print(
            "| model | AUC | logloss | normalized entropy | calibration | parameters | samples/s | slim AUC | slim parameters |"
        )
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for model in arguments.models:
            folder = arguments.output / f"{name}_{model}"
            overrides = [f"model.name={model}", *arguments.overrides]
            sseds("run", f"configs/{name}_deepfm.yaml", *overrides, "--run-dir", folder)
            metrics = json.loads((folder / "metrics.json").read_text())
            base, slim = metrics["pretrain"], metrics["retrain"]
            print(
                f"| {model} | {base['auc']:.4f} | {base['logloss']:.4f} | {base['normalized_entropy']:.4f} "
                f"| {base['calibration']:.3f} | {base['parameters']:,} | {base['samples_per_second']:,.0f} "
                f"| {slim['auc']:.4f} | {slim['parameters']:,} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
