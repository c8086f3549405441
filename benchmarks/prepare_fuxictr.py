"""FuxiCTR's part in `prepare.py`, which runs it: `prepare_fuxictr.py FOLDER OUTPUT BLOCK`.

Prepares FOLDER/{train,valid,test}.csv into OUTPUT with FuxiCTR's own Criteo processor: integers bucketed by floor(log(x)^2),
then ids; values seen fewer than 10 times become one id; part files of about BLOCK rows. It runs in a virtual environment of
its own, so nothing of `sseds_rec` is imported.
"""

from __future__ import annotations

import sys

from fuxictr.datasets.criteo import CustomizedFeatureProcessor
from fuxictr.preprocess import build_dataset

INTEGERS = [f"I{i}" for i in range(1, 14)]
CATEGORIES = [f"C{i}" for i in range(1, 27)]


def main() -> None:
    folder, output, block = sys.argv[1:]
    processor = CustomizedFeatureProcessor(
        feature_cols=[
            {
                "name": INTEGERS,
                "active": True,
                "dtype": "float",
                "type": "categorical",
                "preprocess": "convert_to_bucket",
                "fill_na": 0,
            },
            {"name": CATEGORIES, "active": True, "dtype": "str", "type": "categorical", "fill_na": ""},
        ],
        label_col={"name": "label", "dtype": "float"},
        dataset_id="criteo",
        data_root=output,
    )
    build_dataset(
        processor,
        train_data=f"{folder}/train.csv",
        valid_data=f"{folder}/valid.csv",
        test_data=f"{folder}/test.csv",
        min_categr_count=10,
        data_block_size=int(block),
    )


if __name__ == "__main__":
    main()
