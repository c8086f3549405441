"""The stages of a run."""

from typing import Literal, get_args

#: In order: each reads only what those before it wrote.
Stage = Literal["pretrain", "search", "slim", "retrain", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)
