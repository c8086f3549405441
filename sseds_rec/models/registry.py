"""Models by name, and what they all are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from torch import nn

from sseds_rec.constants import KERNEL_MULTIPLE
from sseds_rec.errors import UserError

if TYPE_CHECKING:
    from sseds_rec.models.fields import FieldEmbeddings
    from sseds_rec.search.plan import DimensionPlan


class OverArch(nn.Module):
    """What lies over the embeddings: `Model(fields, num_dense, config)`, `forward(dense [B, N], KeyedTensor) -> logits [B]`.

    It is written for one device, and reads the embeddings through `fields`, which hides whether they are uniform or slim.
    Every parameter must take part in every forward pass: DistributedDataParallel refuses others.

    Attributes:
        fields: the embedding side.
        aligns: whether the model takes aligned embeddings (`fields.align`, `fields.fm`). One that does not has no transform
            matrices in its slim form.
        over_raw: parameter -> its axes that run over [dense inputs, raw concatenation]. Of these, slimming keeps the positions
            of the kept columns. A `*` in a name stands for any part of it ("cross.*.bias").
        rotates: whether its tables may be cut in another basis: all that reads the raw concatenation is linear in it.
    """

    fields: FieldEmbeddings
    aligns: ClassVar[bool] = False
    over_raw: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    rotates: ClassVar[bool] = True

    def kept_inputs(self, plan: DimensionPlan) -> Mapping[str, tuple[int, list[int]]]:
        """For parameters over inputs of the model's own making: which of the full model's inputs its slim form has.

        Args:
            plan: tables in the order of the full model's fields.

        Returns:
            parameter -> (axis, positions along it in the full model's parameter, in the order of this one's).
        """
        return {}


MODELS: dict[str, type[OverArch]] = {}


class ModelConfig(BaseModel):
    """The `model` section of a config; the defaults are the paper's (Section 4.1.3), but for the width.

    Attributes:
        name: a registered model.
        embedding_dim: D of every table before the search.
        hidden: widths of the deep part, in DLRM of the top MLP; FM has none and ignores it.
        dropout: probability in [0, 1), after every hidden layer.
        batch_norm: after every hidden linear layer.
        bottom_hidden: DLRM only: widths of the bottom MLP, before its last layer of the embeddings' width.
        cross_layers: DCNv2 only.
        cross_rank: DCNv2 only: rank of the cross layers' weights; null for full matrices.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = "deepfm"
    embedding_dim: int = Field(64, gt=0)
    hidden: list[PositiveInt] = Field([1024, 1024], min_length=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    batch_norm: bool = False
    bottom_hidden: list[PositiveInt] = Field([512, 256], min_length=1)
    cross_layers: int = Field(3, gt=0)
    cross_rank: int | None = Field(64, gt=0)

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


def check_rotates(config: ModelConfig) -> None:
    """Refuses to cut the tables of a model in another basis if its slim form could not undo that.

    Raises:
        UserError: names the model.
    """
    if not MODELS[config.name].rotates:
        others = ", ".join(sorted(name for name, model in MODELS.items() if model.rotates))
        raise UserError(
            f"model.name={config.name} multiplies raw columns one by one, which no rotated table can stand for; "
            f"search without rotation, or choose one of {others}"
        )
