"""The batches behind scores, which can be drawn again."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from sseds_rec.search.criteria import Criterion
from sseds_rec.search.moments import Moments
from sseds_rec.search.rotation import Rotation


class Draws:
    """What a criterion saw of every batch.

    Args:
        criterion: what makes scores of it.
        moments: at least one batch's.

    Attributes:
        rotations: table -> the basis that all batches together give, in which every draw is scored.
    """

    def __init__(self, criterion: Criterion, moments: Moments) -> None:
        self._criterion, self._moments = criterion, moments
        self.groups = moments.groups
        bases = {name: criterion.basis(*means) for name, means in moments.means().items()}
        self.rotations: dict[str, Rotation] = {name: basis for name, basis in bases.items() if basis is not None}
        if self.rotations and dist.is_initialized() and dist.get_world_size() > 1:
            # Processors of another kind may give an eigenvector another sign, and all ranks must cut alike.
            shared = [self.rotations]
            dist.broadcast_object_list(shared)
            self.rotations = shared[0]

    def raw(self, times: Tensor | None = None) -> dict[str, Tensor]:
        """Table -> scores [D], not normalised.

        Args:
            times: how often each batch, or group of batches, counts, float64 [groups]; once each by default.
        """
        means = self._moments.means(times)
        return {name: self._criterion.score_in(self.rotations.get(name), *own) for name, own in means.items()}
