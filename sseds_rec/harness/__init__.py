"""The methods under `search.method`, as pipelines: each overrides the stages in which it differs from SSEDS."""

from __future__ import annotations

from sseds_rec.config import Config
from sseds_rec.distributed.runtime import Runtime
from sseds_rec.harness.autodim import Autodim
from sseds_rec.harness.deeplight import DeepLight
from sseds_rec.harness.pep import Pep
from sseds_rec.harness.scratch import DropFields, Mde, Uniform
from sseds_rec.pipeline import Pipeline
from sseds_rec.run_directory import RunDirectory

PIPELINES: dict[str, type[Pipeline]] = {
    "sseds": Pipeline,
    "uniform": Uniform,
    "mde": Mde,
    "autodim": Autodim,
    "drop_fields": DropFields,
    "pep": Pep,
    "deeplight": DeepLight,
}


def pipeline_for(config: Config, run: RunDirectory, runtime: Runtime) -> Pipeline:
    """The pipeline of the config's method, see `Pipeline`."""
    return PIPELINES[config.search.method](config, run, runtime)
