"""Models by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from torch import nn

from sseds_rec.distributed.tables import KERNEL_MULTIPLE

if TYPE_CHECKING:
    from sseds_rec.models.fields import FieldEmbeddings


class OverArch(nn.Module):
    """What lies over the embeddings: `forward(dense [B, N], embeddings: KeyedTensor) -> logits [B]`.

    Attributes:
        over_raw: parameters whose last axis runs over [dense inputs, raw concatenation of the fields]: of these, slimming
            keeps the weights of the kept columns.
    """

    over_raw: ClassVar[tuple[str, ...]] = ()


MODELS: dict[str, Callable[[FieldEmbeddings, int, ModelConfig], OverArch]] = {}


class ModelConfig(BaseModel):
    """The `model` section of a config; the defaults are the paper's (Section 4.1.3), but for the width.

    Attributes:
        name: a registered model.
        embedding_dim: D of every table before the search.
        hidden: widths of the deep part.
        dropout: probability in [0, 1).
        batch_norm: after every hidden linear layer.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = "deepfm"
    embedding_dim: int = Field(64, gt=0)
    hidden: list[PositiveInt] = Field([1024, 1024], min_length=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    batch_norm: bool = False

    @field_validator("embedding_dim")
    @classmethod
    def _kernel_width(cls, value: int) -> int:
        if value % KERNEL_MULTIPLE:
            raise ValueError(f"{value} is not a multiple of {KERNEL_MULTIPLE}, which FBGEMM's kernels require")
        return value

    @field_validator("name")
    @classmethod
    def _registered(cls, value: str) -> str:
        if value not in MODELS:
            raise ValueError(f"no model named {value!r}; choose one of {', '.join(sorted(MODELS))}")
        return value


def register(name: str) -> Callable[[type[OverArch]], type[OverArch]]:
    """Class decorator: makes a model known to configs as `name`."""

    def add(model: type[OverArch]) -> type[OverArch]:
        MODELS[name] = model
        return model

    return add
