"""One training step as TorchRec's pipelines run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer

from sseds_rec.data.batch import Batch
from sseds_rec.distributed.managed import is_managed
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.distributed.tables import embedding_modules

#: (reported loss, logits [B], labels [B]) of a step over the next of the batches; raises StopIteration after the last.
TrainStep = Callable[[Iterator[Batch]], tuple[Tensor, Tensor, Tensor]]


@contextmanager
def train_pipeline(
    model: DistributedModelParallel, optimizer: KeyedOptimizer, runtime: Runtime, overlap: bool | None = None
) -> Iterator[TrainStep]:
    """Gives a function that does one training step: zero_grad, forward, backward, optimizer step.

    On CUDA the ids of the next batch go to their ranks, and the batch after it to the GPU, while this one is trained on
    (`TrainPipelineSparseDist`). On a CPU there is nothing to overlap with. Raw ids are mapped to rows inside the model, which
    the pipeline cannot do ahead.

    Args:
        model: sharded, in training mode; Batch -> (loss, (loss, logits [B], labels [B])). Afterwards it is as before.
        optimizer: over all its parameters.
        runtime: of this process.
        overlap: whether to send ids ahead; on CUDA, where it can be done, if not given.
    """
    if overlap is None:
        overlap = runtime.device.type == "cuda" and not any(map(is_managed, embedding_modules(model).values()))
    if not overlap:
        yield TrainPipelineBase(model, optimizer, runtime.device).progress
        return
    pipeline = TrainPipelineSparseDist(model, optimizer, runtime.device)
    try:
        yield pipeline.progress
    finally:
        pipeline.detach()
