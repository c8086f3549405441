"""What the components ask of each scheduler, read from the script or manifest that `torchx run --dryrun` prints."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser
from torchx.specs import materialize_appdef
from torchx.specs.finder import get_component

from sseds_rec.cli import app
from tests.command import COMPONENTS, torchx

OVERRIDE = "data.path=/mnt/it's a $HOME"


@dataclass
class Node:
    """One node as a scheduler is asked for it, in its own words."""

    command: list[str]
    env: dict[str, str]
    cpu: str
    memory: str
    gpu: str
    image: str | None = None
    mounts: tuple[Any, ...] = ()


def dryrun(scheduler: str, cwd: Path, *args: object, cfg: str = "queue=q") -> str:
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    command = ["run", "-s", scheduler, "-cfg", cfg, "--workspace", "", "--dryrun", f"{COMPONENTS}:run"]
    done = torchx(*command, *args, cwd=cwd, PATH=path)
    assert done.code == 0, done.err
    return done.out.partition("=== SCHEDULER REQUEST ===\n")[2]


def slurm_nodes(request: str, folder: Path) -> tuple[list[Node], str]:
    script = request.partition("#!")[2]
    (folder / "script").write_text(f"#!{script}")
    subprocess.run(["bash", "-n", folder / "script"], check=True)
    asked = [
        dict(option.removeprefix("--").partition("=")[::2] for option in shlex.split(line)[1:])
        for line in script.splitlines()
        if line.startswith("#SBATCH --")
    ]
    (started,) = (line for line in script.replace("\\\n", "").splitlines() if line.startswith("srun "))
    nodes = []
    for options, words in zip(asked, started.removeprefix("srun ").split(" :    "), strict=True):
        *own, bash, dash_c, line = shlex.split(words)
        (exported,) = (word for word in own if word.startswith("--export=ALL,"))
        env = dict(pair.split("=", 1) for pair in exported.split(",")[1:])
        assert (bash, dash_c, options["partition"]) == ("bash", "-c", "main")
        nodes.append(Node(shlex.split(line), env, options["cpus-per-task"], options["mem"], options["gpus-per-task"]))
    return nodes, script.partition("TORCHX_MAX_RETRIES=")[2].splitlines()[0]


def kubernetes_nodes(request: str) -> tuple[list[Node], str]:
    job = yaml.safe_load(request)
    assert (job["kind"], job["spec"]["queue"]) == ("Job", "q")
    nodes = []
    for task in job["spec"]["tasks"]:
        pod = task["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = tuple(
            (volumes[mount["name"]]["hostPath"]["path"], mount["mountPath"], mount["readOnly"])
            for mount in container["volumeMounts"]
            if mount["mountPath"] != "/dev/shm"
        )
        limits = container["resources"]["limits"]
        nodes.append(
            Node(
                shlex.split(container["command"][2]),
                {variable["name"]: variable["value"] for variable in container["env"]},
                limits["cpu"],
                limits["memory"],
                limits["nvidia.com/gpu"],
                container["image"],
                mounts,
            )
        )
    return nodes, str(job["spec"]["maxRetry"])


def aws_batch_nodes(request: str) -> tuple[list[Node], str]:
    job = yaml.safe_load(request)
    properties = job["job_def"]["nodeProperties"]
    (group,) = properties["nodeRangeProperties"]
    assert (job["queue"], group["targetNodes"]) == ("q", f"0:{properties['numNodes'] - 1}")
    container = group["container"]
    needs = {need["type"]: need["value"] for need in container["resourceRequirements"]}
    sources = {volume["name"]: volume["host"]["sourcePath"] for volume in container["volumes"]}
    node = Node(
        shlex.split(container["command"][2]),
        {variable["name"]: variable["value"] for variable in container["environment"]},
        needs["VCPU"],
        needs["MEMORY"],
        needs["GPU"],
        container["image"],
        tuple(
            (sources[mount["sourceVolume"]], mount["containerPath"], mount["readOnly"])
            for mount in container["mountPoints"]
        ),
    )
    return [node] * properties["numNodes"], str(job["job_def"]["retryStrategy"]["attempts"])


def docker_nodes(request: str) -> tuple[list[Node], str]:
    nodes, retries = [], set()
    for container in yaml.unsafe_load(request):
        more = container.kwargs
        retries.add(str(more["restart_policy"]["MaximumRetryCount"]))
        nodes.append(
            Node(
                shlex.split(container.command[2]),
                more["environment"],
                str(more["nano_cpus"]),
                more["mem_limit"],
                str(more["device_requests"][0]["Count"]),
                container.image,
                tuple((mount["Source"], mount["Target"], mount["ReadOnly"]) for mount in more["mounts"]),
            )
        )
    return nodes, retries.pop()


@pytest.mark.parametrize(
    ("scheduler", "first_node", "cpu", "memory"),
    [
        ("slurm", "${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}", "8", "16000"),
        ("kubernetes", "${TORCHX_RANK0_HOST:=localhost} ${VC_RUN_0_HOSTS:=localhost}", "8000m", "16000M"),
        ("aws_batch", "${AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS:=localhost}", "8", "16000"),
        ("local_docker", "${TORCHX_RANK0_HOST:=localhost}", "8000000000", "16000m"),
    ],
)
def test_what_a_scheduler_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str, first_node: str, cpu: str, memory: str
) -> None:
    launch = ["-j", "2x4", "--cpu", 8, "--gpu", 4, "--memMB", 16000, "--image", "me/sseds:1", "--rdzv_port", 29444]
    launch += ["--env", "A=1,B=x", "--mounts", "type=bind,src=/data,dst=/mnt,readonly"]
    launch += ["--max_retries", 2, "--max_restarts", 3, "--config", "/mnt/my.yaml", "--run_dir", "/mnt/a run"]
    cfg = {"slurm": "partition=main", "local_docker": "privileged=false"}.get(scheduler, "queue=q")
    request = dryrun(scheduler, tmp_path, *launch, "--paper", "true", OVERRIDE, "--json", cfg=cfg)
    if scheduler == "slurm":
        nodes, retries = slurm_nodes(request, tmp_path)
    else:
        read = {"kubernetes": kubernetes_nodes, "aws_batch": aws_batch_nodes, "local_docker": docker_nodes}
        nodes, retries = read[scheduler](request)
    verb = ["-m", "sseds_rec", "run", "/mnt/my.yaml", OVERRIDE, "--json", "--run-dir", "/mnt/a run", "--paper"]
    assert len(nodes) == 2 and retries == "2"
    for node in nodes:
        assert node.command[0] == "torchrun" and node.command[-len(verb) :] == verb
        with monkeypatch.context() as environment:
            for name, value in node.env.items():
                environment.setenv(name, value)
            started = get_args_parser().parse_args(node.command[1:])
        assert (started.nnodes, started.nproc_per_node, started.max_restarts) == ("2", "4", 3)
        host, _, port = started.rdzv_endpoint.rpartition(":")
        assert host in first_node.split() and port == "29444"
        own = {"A": "1", "B": "x", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "2"}
        assert own.items() <= node.env.items()
        assert (node.cpu, node.memory, node.gpu) == (cpu, memory, "4")
        if scheduler != "slurm":
            assert (node.image, node.mounts) == ("me/sseds:1", (("/data", "/mnt", True),))
    if scheduler == "kubernetes":  # the first node has no other to look up
        assert [node.env.get("TORCHX_RANK0_HOST") for node in nodes] == ["localhost", None]


def role(verb: str, *args: str) -> Any:
    (found,) = materialize_appdef(get_component(f"{COMPONENTS}:{verb}").fn, list(args)).roles
    return found


@pytest.mark.parametrize(
    ("args", "cpu", "gpu", "memory", "threads"),
    [
        ("-j 1x1", -1, 0, -1, None),
        ("-j 1x4", 4, 0, -1, "1"),
        ("-j 1x4 --cpu 32", 32, 0, -1, "8"),
        ("-j 1x4 --cpu 2", 2, 0, -1, "1"),
        ("-j 2x4 -h gpu.large", 32, 4, 131072, "8"),
        ("-j 1x4 --cpu 32 --env OMP_NUM_THREADS=3", 32, 0, -1, "3"),
    ],
)
def test_resources_and_threads(args: str, cpu: int, gpu: int, memory: int, threads: str | None) -> None:
    node = role("train", *args.split(), "--config", "my.yaml")
    assert (node.resource.cpu, node.resource.gpu, node.resource.memMB) == (cpu, gpu, memory)
    assert node.env.get("OMP_NUM_THREADS") == threads


def test_elastic_number_of_nodes() -> None:
    node = role("train", "-j", "1:2x4", "--config", "my.yaml")
    assert (node.min_replicas, node.num_replicas) == (1, 2)
    words = shlex.split(node.args[1])
    assert words[words.index("--nnodes") + 1] == "1:2"


CONFIG = ["--config", "my.yaml", "--run_dir", "runs/my"]
VERBS = {
    "prepare": (
        ["--recipe", "table", "--output", "data/my", "--", "--input=a.csv", "--input=b.csv", "--label=click"],
        "prepare table --output data/my --input=a.csv --input=b.csv --label=click",
    ),
    "train": ([*CONFIG, "train.epochs=2", "--rerun"], "train my.yaml train.epochs=2 --rerun --run-dir runs/my"),
    "search": ([*CONFIG, "--paper", "True"], "search my.yaml --run-dir runs/my --paper"),
    "run": (
        [*CONFIG, "--rerun_from", "search", "--", "--json"],
        "run my.yaml --json --run-dir runs/my --rerun-from search",
    ),
    "slim": (
        ["-j", "1x4", "--plan", "plan.json", "full", "thin"],
        "slim full thin --plan plan.json",
    ),
    "evaluate": (
        [*CONFIG, "a.b=c", "--", "--split", "validation"],
        "evaluate my.yaml a.b=c --split validation --run-dir runs/my",
    ),
    "compare": (["--config", "my.yaml", "train.epochs=2"], "compare my.yaml train.epochs=2"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_command_of_each_verb(verb: str) -> None:
    args, expected = VERBS[verb]
    node = role(verb, *args)
    words = shlex.split(node.args[1])
    assert node.name == verb
    command = words[words.index("sseds_rec") + 1 :]
    assert command == expected.split()
    group = typer.main.get_command(app)
    for name in command:  # prepare is a group of its own
        group = getattr(group, "commands", {}).get(name, group)
    group.make_context(verb, command[2 if verb == "prepare" else 1 :])  # refuses what the verb does not have


def test_help_names_the_options_of_launch_and_verb(tmp_path: Path) -> None:
    done = torchx("run", "-s", "local_cwd", f"{COMPONENTS}:slim", "--help", cwd=tmp_path)
    shown = " ".join(done.out.split())
    assert done.code == 0 and "Makes the slim checkpoint of a run (--config), or of any checkpoint" in shown
    assert "--plan str plan.json to whose widths SRC is converted" in shown
    assert "-j str, --j str nodes x processes on each, as in 2x8" in shown
    assert "--max_restarts int how often torchrun starts the processes again" in shown


@pytest.mark.parametrize(
    ("verb", "args", "says"),
    [
        ("run", "--config c -j 2by2", "-j 2by2: give NODESxPROCESSES, as in 2x8"),
        ("run", "--config c -j 0x2", "-j 0x2: give NODESxPROCESSES"),
        ("run", "--config c -h gpu.smal", "Did you mean `gpu.small`?"),
        ("run", "--config c -j 1x4 --gpu 2", "4 processes need as many GPUs a node, and it has 2"),
        ("run", "--config c --env A", "--env A: give NAME=VALUE"),
        ("run", "--config c --memMB=-5", "--memMB -5: give a number from 0 on"),
        ("run", "--config c --rdzv_port 99999", "--rdzv_port 99999: give a number from 0 on up to 65535"),
        ("run", "--config c --mounts type=bind,src=/a", "--mounts type=bind,src=/a: give type="),
        ("slim", "-j 1x2", "give --config FILE for a run, or --plan FILE and then SRC DST"),
        ("slim", "--config c --plan p", "give --config FILE for a run, or --plan FILE and then SRC DST"),
        ("prepare", "--recipe flights --output d -j 1x2", "-j 1x2: preparing is one process; leave -j out"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], verb: str, args: str, says: str) -> None:
    with pytest.raises(SystemExit) as ended:
        role(verb, *args.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"sseds.py:{verb}: ") and says in line


def test_bad_input_on_the_command_line(tmp_path: Path) -> None:
    refused = torchx("run", "-s", "local_cwd", f"{COMPONENTS}:run", "--config", "c", "-j", "2", cwd=tmp_path)
    assert refused.code == 2 and "Traceback" not in refused.err
    assert refused.err.splitlines()[-1] == "sseds.py:run: -j 2: give NODESxPROCESSES, as in 2x8"
    missing = torchx("run", "-s", "local_cwd", f"{COMPONENTS}:run", "-j", "1x1", cwd=tmp_path)
    assert missing.code == 2 and "the following arguments are required: --config" in missing.err
