"""Single-shot embedding dimension search for TorchRec models.

Example::

    import sseds_rec as sr

    scores = sr.score_dimensions(model, batches, criterion="ggn", num_batches=32)
    plan = sr.allocate(scores, sr.Budget(parameters=0.1))
    slim = sr.slim(model, plan)
"""

from sseds_rec import _fbgemm

_fbgemm.check()  # before anything imports TorchRec

from sseds_rec.errors import UserError
from sseds_rec.search.allocate import Budget, allocate
from sseds_rec.search.plan import DimensionPlan
from sseds_rec.search.saliency import score_dimensions
from sseds_rec.slim.checkpoint import slim_checkpoint
from sseds_rec.slim.surgery import slim

__all__ = ["Budget", "DimensionPlan", "UserError", "allocate", "score_dimensions", "slim", "slim_checkpoint"]
