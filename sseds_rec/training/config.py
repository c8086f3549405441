"""The `train` section of a config."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

TableOptimizer = Literal["adam", "rowwise_adagrad", "adagrad", "sgd"]
Precision = Literal["float32", "tf32", "bf16"]

#: The classes of torch.optim that cannot train all dense parameters: they want a closure, sparse gradients, matrices only.
_OTHERS = ("Optimizer", "LBFGS", "SparseAdam", "Muon")


class TrainConfig(BaseModel):
    """The `train` section of a config; the defaults are the paper's (Section 4.1.3).

    Attributes:
        epochs: at most.
        batch_size: rows a step over all ranks.
        optimizer: a class of torch.optim, for the dense parameters.
        optimizer_options: what else its constructor takes, e.g. {weight_decay: 0.01}.
        learning_rate: of the dense parameters.
        table_optimizer: what trains the embedding tables. "adam" on a CPU costs time and memory for every row in every step
            (see `placement_for`).
        table_learning_rate: its learning rate; null for `learning_rate`.
        warmup_steps: over which both rates rise linearly; 0 for none.
        reduce_patience: validations in a row without a better AUC after which both rates are reduced; null for never.
        reduce_factor: what they are then multiplied with.
        clip_norm: the largest global norm of the dense parameters' gradients; null for no clipping. Tables are not clipped:
            their fused update happens inside backward, before the norm is known.
        embedding_l2: λ of λ/2 · mean_b Σ_i ||e_bi||² over the batch's embeddings.
        patience: validations in a row without a better AUC after which training stops.
        precision: of the dense part's products; "bf16" is autocast, "tf32" on CUDA only.
        compile: the dense part with torch.compile.
        checkpoint_steps: steps between checkpoints; null for one an epoch.
        keep_checkpoints: how many of the last ones to keep, besides the best.
        async_checkpoints: write them while training goes on.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    epochs: int = Field(10, ge=1, strict=True)
    batch_size: int = Field(2048, ge=1, strict=True)
    optimizer: str = "Adam"
    optimizer_options: dict[str, Any] = {}
    learning_rate: float = Field(1e-3, gt=0)
    table_optimizer: TableOptimizer = "adam"
    table_learning_rate: float | None = Field(None, gt=0)
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    embedding_l2: float = Field(0.0, ge=0)
    patience: int = Field(2, ge=1)
    reduce_patience: int | None = Field(None, ge=1)
    reduce_factor: float = Field(0.1, gt=0, lt=1)
    precision: Precision = "float32"
    compile: bool = False
    checkpoint_steps: int | None = Field(None, ge=1)
    keep_checkpoints: int = Field(1, ge=1)
    async_checkpoints: bool = False

    @property
    def table_rate(self) -> float:
        """The tables' learning rate."""
        return self.learning_rate if self.table_learning_rate is None else self.table_learning_rate

    def until_the_end(self, epochs: int) -> TrainConfig:
        """This section for a search, which trains for so many epochs whatever validation says."""
        return self.model_copy(update={"epochs": epochs, "patience": epochs, "reduce_patience": None})

    @field_validator("optimizer")
    @classmethod
    def _of_torch(cls, name: str) -> str:
        names = [
            other
            for other, kind in vars(torch.optim).items()
            if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and other not in _OTHERS
        ]
        if name not in names:
            raise ValueError(
                f"torch.optim has none of this name for dense parameters; choose one of {', '.join(names)}"
            )
        return name

    @field_validator("optimizer_options")
    @classmethod
    def _taken_by_optimizer(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "optimizer" not in info.data:  # refused already
            return options
        optimizer = getattr(torch.optim, info.data["optimizer"])
        known = [name for name in inspect.signature(optimizer).parameters if name not in ("params", "lr")]
        for name in options:
            if name not in known:
                hint = "set train.learning_rate" if name == "lr" else f"{optimizer.__name__} takes {', '.join(known)}"
                raise ValueError(f"no option train.optimizer_options.{name}; {hint}")
        try:
            optimizer([torch.zeros(1, 1)], **options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{optimizer.__name__} refuses {options}: {error}") from None
        return options

    @field_validator("reduce_patience")
    @classmethod
    def _before_the_end(cls, validations: int | None, info: ValidationInfo) -> int | None:
        patience = info.data.get("patience")
        if validations is not None and patience is not None and validations >= patience:
            raise ValueError(f"training stops after train.patience={patience}; choose a smaller value")
        return validations
