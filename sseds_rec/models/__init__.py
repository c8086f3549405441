"""Models over a KeyedTensor of embeddings. Importing the package registers them."""

from sseds_rec.models import dcnv2, deepfm, dlrm, dnn, fm, wide_deep  # noqa: F401
from sseds_rec.models.ctr import (
    CtrModel,
    build_model,
    build_slim_model,
    names_in_scores,
    plan_for,
    raw_fields,
    rows_of,
    table_names,
)
from sseds_rec.models.registry import MODELS, ModelConfig

__all__ = [
    "MODELS",
    "CtrModel",
    "ModelConfig",
    "build_model",
    "build_slim_model",
    "names_in_scores",
    "plan_for",
    "raw_fields",
    "rows_of",
    "table_names",
]
