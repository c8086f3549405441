"""FuxiCTR's part in `end_to_end.py`, which runs it: `end_to_end_fuxictr.py FOLDER DIM REGULARIZER`.

Trains one epoch of DeepFM, composed of FuxiCTR's own layers, on FOLDER/{train,valid}.npz, with what its `BaseModel.fit` does
besides: gradient clipping, validation, the best model saved. It reads npz, which it holds in memory; its Parquet loader starts
Ray and is slower. Prints the samples/s of training. It runs in a virtual environment of its own, so nothing of `sseds_rec` is
imported.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel


class DeepFM(BaseModel):
    def __init__(self, feature_map: FeatureMap, dim: int, regularizer: float, folder: str) -> None:
        super().__init__(
            feature_map,
            model_id="deepfm",
            task="binary_classification",
            embedding_regularizer=regularizer or None,
            model_root=folder,
            metrics=["AUC"],
            verbose=0,
        )
        os.makedirs(self.model_dir, exist_ok=True)
        self.embedding_layer = FeatureEmbedding(feature_map, dim)
        self.fm = FactorizationMachine(feature_map)
        self.mlp = MLP_Block(input_dim=feature_map.sum_emb_out_dim(), output_dim=1, hidden_units=[1024, 1024])
        self.compile("adam", "binary_crossentropy", 1e-3)
        self.reset_parameters()
        self.model_to_device()
        self.evaluation_seconds = 0.0

    def forward(self, inputs: Any) -> dict[str, torch.Tensor]:
        x = self.get_inputs(inputs)
        embeddings = self.embedding_layer(x)
        z = self.fm(x, embeddings) + self.mlp(embeddings.flatten(start_dim=1))
        return {"y_pred": self.output_activation(z)}

    def eval_step(self) -> None:
        begun = time.perf_counter()
        super().eval_step()
        self.evaluation_seconds += time.perf_counter() - begun


def main() -> None:
    folder, dim, regularizer = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    feature_map = FeatureMap("fuxictr", folder)
    feature_map.load(f"{folder}/feature_map.json", {"embedding_dim": dim})
    train, valid = RankDataLoader(
        feature_map,
        stage="train",
        train_data=f"{folder}/train.npz",
        valid_data=f"{folder}/valid.npz",
        batch_size=2048,
        data_format="npz",
    )
    model = DeepFM(feature_map, dim, regularizer, folder)
    begun = time.perf_counter()
    model.fit(train, validation_data=valid, epochs=1)
    print(train.num_samples / (time.perf_counter() - begun - model.evaluation_seconds))


if __name__ == "__main__":
    main()
