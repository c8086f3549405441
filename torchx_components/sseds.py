"""TorchX components: `torchx run -s SCHEDULER torchx_components/sseds.py:run -j 2x4 --config my.yaml`.

Each starts a verb of `sseds` under torchrun and has, besides its own options, those of `_launch`. What follows the options
goes to the verb as it stands: config overrides, and its other options. See docs/launch.md.
"""

import inspect
import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable
from typing import Any, NoReturn, Optional

from torchx.components.dist import ddp
from torchx.specs import NULL_RESOURCE, AppDef, parse_mounts
from torchx.util.types import to_dict


def _launch(
    verb: str,
    arguments: list[str],
    *,
    j: str = "1x1",
    image: str = "sseds-rec",
    name: Optional[str] = None,
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    env: Optional[str] = None,
    mounts: Optional[list[str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_backend: str = "c10d",
    rdzv_port: int = 29500,
) -> AppDef:
    """The job of a verb.

    Args:
        verb: of `sseds`.
        arguments: of the verb.
        j: nodes x processes on each, as in 2x8; 1:2x8 goes on with one node where the scheduler is elastic
        image: container image with sseds_rec in it; local_cwd and slurm need none
        name: of the job, or experiment/job; sseds-VERB if not given
        h: named resource of a node, in place of cpu, gpu and memMB
        cpu: cores of a node, which its processes share; 0 for one each, and for what the scheduler gives a single one
        gpu: GPUs of a node, at least one a process; 0 for none
        memMB: memory of a node in MB; 0 for what the scheduler gives (aws_batch gives none)
        env: environment of the nodes, as in A=1,B=2
        mounts: of the container, as in type=bind,src=/data,dst=/data,readonly
        max_retries: how often the scheduler starts a failed job again
        max_restarts: how often torchrun starts the processes again when one of them failed
        rdzv_backend: how the nodes find each other
        rdzv_port: and at which port of the first node
    """
    shape = re.fullmatch(r"(?:[1-9]\d*:)?[1-9]\d*x([1-9]\d*)", j)
    if not shape:
        _refuse(verb, f"-j {j}: give NODESxPROCESSES, as in 2x8")
    processes = int(shape[1])
    for option, value, most in (
        ("cpu", cpu, None),
        ("gpu", gpu, None),
        ("memMB", memMB, None),
        ("rdzv_port", rdzv_port, 65535),
    ):
        if value < 0 or (most is not None and value > most):
            _refuse(verb, f"--{option} {value}: give a number from 0 on" + (f" up to {most}" if most else ""))
    try:
        variables = to_dict(env or "")
    except ValueError:
        _refuse(verb, f"--env {env}: give NAME=VALUE, several with commas between them")
    try:
        parse_mounts(mounts or [])
    except (KeyError, ValueError) as error:
        _refuse(verb, f"--mounts {','.join(mounts or [])}: give type=bind (volume, device),src=...,dst=... ({error})")
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PET_MAX_RESTARTS": str(max_restarts), **variables}
    try:
        app = ddp(
            verb,
            *(argument for argument in arguments if argument != "--"),
            m="sseds_rec",
            image=image,
            name=name or f"sseds-{verb}",
            h=h,
            cpu=cpu or (processes if processes > 1 else NULL_RESOURCE.cpu),
            gpu=gpu,
            memMB=memMB or NULL_RESOURCE.memMB,
            j=j,
            env=environment,
            max_retries=max_retries,
            rdzv_backend=rdzv_backend,
            rdzv_port=rdzv_port,
            mounts=mounts,
        )
    except (KeyError, ValueError) as error:  # no such resource, no such name
        _refuse(verb, error.args[0])
    (role,) = app.roles
    role.name = verb
    if 0 < role.resource.gpu < processes:
        _refuse(verb, f"-j {j}: {processes} processes need as many GPUs a node, and it has {role.resource.gpu}")
    if role.resource.cpu > 0:
        role.env.setdefault("OMP_NUM_THREADS", str(max(1, role.resource.cpu // processes)))
    scripts = sysconfig.get_path("scripts")
    if shutil.which("torchrun") != os.path.join(scripts, "torchrun"):  # this environment is not the active one
        role.args[-1] = f'PATH={shlex.quote(scripts)}:"$$PATH" {role.args[-1]}'
    return app


def _launchable(component: Callable[..., AppDef]) -> Callable[..., AppDef]:
    """Shows TorchX the options and the help of `_launch` in place of a component's `**launch`."""
    own, shared = (inspect.signature(function).parameters.values() for function in (component, _launch))
    parameters = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    parameters += [parameter for parameter in shared if parameter.kind is parameter.KEYWORD_ONLY]
    component.__signature__ = inspect.Signature(parameters, return_annotation=AppDef)  # type: ignore[attr-defined]
    component.__doc__ = f"{inspect.getdoc(component)}\n{(inspect.getdoc(_launch) or '').partition('Args:')[2]}"
    return component


def _options(**given: Any) -> list[str]:
    """Options of the command line, those that are given."""
    names = {f"--{key.replace('_', '-')}": value for key, value in given.items() if value}
    return [part for name, value in names.items() for part in ([name] if value is True else [name, value])]


def _refuse(verb: str, why: str) -> NoReturn:
    """Ends as TorchX does after options that it cannot parse."""
    print(f"sseds.py:{verb}: {why}", file=sys.stderr)
    raise SystemExit(2)


@_launchable
def prepare(*options: str, recipe: str, output: str, **launch: Any) -> AppDef:
    """Turns raw rows into an encoded data set, in one process.

    Args:
        options: of the recipe, as in --input=log.csv --label=click
        recipe: flights, table, criteo, avazu or synthetic
        output: folder to make
    """
    if launch.get("j", "1x1") != "1x1":
        _refuse("prepare", f"-j {launch['j']}: preparing is one process; leave -j out")
    return _launch("prepare", [recipe, *_options(output=output), *options], **launch)


@_launchable
def train(*overrides: str, config: str, run_dir: Optional[str] = None, **launch: Any) -> AppDef:
    """Trains the full model.

    Args:
        overrides: config values to change, as in train.epochs=2, and other options of the verb
        config: YAML file of the experiment, where the nodes find it
        run_dir: where the run lives; runs/NAME if not given
    """
    return _launch("train", [config, *overrides, *_options(run_dir=run_dir)], **launch)


@_launchable
def search(*overrides: str, config: str, run_dir: Optional[str] = None, paper: bool = False, **launch: Any) -> AppDef:
    """Scores the trained model's columns and spends the budget: plan.json.

    Args:
        overrides: config values to change, as in search.budget.parameters=0.05, and other options of the verb
        config: YAML file of the experiment, where the nodes find it
        run_dir: where the run lives; runs/NAME if not given
        paper: true for the paper's search
    """
    return _launch("search", [config, *overrides, *_options(run_dir=run_dir, paper=paper)], **launch)


@_launchable
def run(
    *overrides: str,
    config: str,
    run_dir: Optional[str] = None,
    rerun_from: Optional[str] = None,
    paper: bool = False,
    **launch: Any,
) -> AppDef:
    """Does all stages: pretrain, search, slim, retrain, report. Goes on where it stopped.

    Args:
        overrides: config values to change, as in train.epochs=2, and other options of the verb
        config: YAML file of the experiment, where the nodes find it
        run_dir: where the run lives; runs/NAME if not given
        rerun_from: stage to do again, with those after it
        paper: true for the paper's search
    """
    options = _options(run_dir=run_dir, rerun_from=rerun_from, paper=paper)
    return _launch("run", [config, *overrides, *options], **launch)


@_launchable
def slim(
    *arguments: str,
    config: Optional[str] = None,
    plan: Optional[str] = None,
    run_dir: Optional[str] = None,
    paper: bool = False,
    **launch: Any,
) -> AppDef:
    """Makes the slim checkpoint of a run (--config), or of any checkpoint (--plan plan.json SRC DST).

    Args:
        arguments: config values to change, or SRC and DST; and other options of the verb
        config: YAML file of the experiment, where the nodes find it
        plan: plan.json to whose widths SRC is converted
        run_dir: where the run lives; runs/NAME if not given
        paper: true for the paper's search
    """
    if (config is None) == (plan is None):
        _refuse("slim", "give --config FILE for a run, or --plan FILE and then SRC DST for any checkpoint")
    options = _options(plan=plan, run_dir=run_dir, paper=paper)
    return _launch("slim", [*([config] if config else []), *arguments, *options], **launch)


@_launchable
def evaluate(*overrides: str, config: str, run_dir: Optional[str] = None, paper: bool = False, **launch: Any) -> AppDef:
    """Measures a trained model's quality and its speed of inference.

    Args:
        overrides: config values to change, and other options of the verb, as in --split=validation
        config: YAML file of the experiment, where the nodes find it
        run_dir: where the run lives; runs/NAME if not given
        paper: true for the paper's search
    """
    return _launch("evaluate", [config, *overrides, *_options(run_dir=run_dir, paper=paper)], **launch)


@_launchable
def compare(*overrides: str, config: str, run_dir: Optional[str] = None, **launch: Any) -> AppDef:
    """Compares methods of search at the same budget.

    Args:
        overrides: config values to change, and other options of the verb
        config: YAML file of the experiment, where the nodes find it
        run_dir: where the run lives; runs/NAME if not given
    """
    return _launch("compare", [config, *overrides, *_options(run_dir=run_dir)], **launch)
