"""Single-shot embedding dimension search for TorchRec models.

Example::

    import sseds_rec as sr

    scores = sr.score_dimensions(model, batches, criterion="ggn_rotated", num_batches=4)
    plan = sr.allocate(scores, sr.Budget(parameters=0.1), order="knapsack")
    slim = sr.slim(model, plan)
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sseds_rec import _fbgemm

_fbgemm.check_builds()
_fbgemm.check_with_torchrec()

if TYPE_CHECKING:
    from sseds_rec.errors import UserError
    from sseds_rec.search.allocate import allocate
    from sseds_rec.search.audit import audit_dimensions
    from sseds_rec.search.budget import Budget
    from sseds_rec.search.plan import DimensionPlan
    from sseds_rec.search.rescale import rescale
    from sseds_rec.search.rules import TableRule
    from sseds_rec.search.saliency import score_dimensions
    from sseds_rec.search.stability import expected_overlap, standard_errors
    from sseds_rec.slim.checkpoint import slim_checkpoint
    from sseds_rec.slim.merge import merge, unmerge_plan
    from sseds_rec.slim.surgery import slim

__all__ = [
    "Budget",
    "DimensionPlan",
    "TableRule",
    "UserError",
    "allocate",
    "audit_dimensions",
    "expected_overlap",
    "merge",
    "rescale",
    "score_dimensions",
    "slim",
    "slim_checkpoint",
    "standard_errors",
    "unmerge_plan",
]

_HOMES = {
    "Budget": "search.budget",
    "DimensionPlan": "search.plan",
    "TableRule": "search.rules",
    "UserError": "errors",
    "allocate": "search.allocate",
    "audit_dimensions": "search.audit",
    "expected_overlap": "search.stability",
    "merge": "slim.merge",
    "rescale": "search.rescale",
    "score_dimensions": "search.saliency",
    "slim": "slim.surgery",
    "slim_checkpoint": "slim.checkpoint",
    "standard_errors": "search.stability",
    "unmerge_plan": "slim.merge",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and TorchRec with it: seconds that preparing data and `--help` do without."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """`sseds_rec.slim` is the function; the import system would put the subpackage of that name in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
