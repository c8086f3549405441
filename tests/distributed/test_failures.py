"""What fails on one rank ends all of them, within seconds and with the same line, whatever they were waiting for."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sseds_rec.distributed import failures
from sseds_rec.distributed.rendezvous import meet
from sseds_rec.distributed.runtime import Runtime, runtime
from sseds_rec.errors import Preempted, UserError
from tests.distributed.jobs import Agent, damaged, sseds, stop_myself
from tests.models.test_managed_collision import CONFIG as RAW_CONFIG
from tests.models.test_managed_collision import write_raw_set

LIMIT_SECONDS = 30


def _exchange(place: Runtime) -> None:
    """A collective of a model: rank 0 stays in it until all others have joined."""
    dist.all_to_all_single(
        torch.empty(place.world_size), torch.ones(place.world_size)
    ) if place.is_main else place.barrier()


def _fail(how: str, rank: int, quiet_looks: int = failures.SILENT_LOOKS) -> None:
    """Works with the others, until this rank fails in some way."""
    failures.SILENT_LOOKS = quiet_looks
    with runtime("cpu") as place:
        place.barrier()
        if place.rank == rank:
            if how == "user":
                raise UserError("a.parquet: row 3: no number")
            if how == "disk":
                Path("/proc/nothing/file").write_text("")
            if how == "code":
                {}["missing"]
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stop":
                stop_myself()
        if how != "none":
            _exchange(place)


def _ranks(how: str, rank: int = 1, quiet_looks: int = failures.SILENT_LOOKS) -> list[partial[None]]:
    return [partial(_fail, how, rank, quiet_looks)] * 3


NODES = [0, 0, 1]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_all_say_what_a_user_has_to_put_right_once_a_node(tmp_path: Path, rank: int) -> None:
    job = Agent(tmp_path).run(_ranks("user", rank), NODES)
    assert job.codes == [2, 2, 2] and job.seconds < LIMIT_SECONDS
    assert [*job.errors(0), *job.errors(1)] == job.errors(2) == ["a.parquet: row 3: no number"]
    assert "Traceback" not in "".join(job.wrote)


def test_a_fault_of_the_code_is_said_everywhere_and_its_traceback_where_it_was(tmp_path: Path) -> None:
    job = Agent(tmp_path).run(_ranks("code", 2), NODES)
    assert job.codes == [1, 1, 1] and job.seconds < LIMIT_SECONDS
    (line,) = {*job.errors(0), *job.errors(1), *job.errors(2)}
    assert line.startswith("rank 2 failed on ") and "KeyError: 'missing'" in line
    assert [wrote.count("Traceback") for wrote in job.wrote] == [0, 0, 1] and '{}["missing"]' in job.wrote[2]


@pytest.mark.parametrize(
    ("how", "said"), [("kill", "lost another one"), ("stop", "rank 1 of 3 has given no sign of life")]
)
def test_a_rank_that_is_gone_ends_the_others_who_may_be_started_again(tmp_path: Path, how: str, said: str) -> None:
    agent = Agent(tmp_path)
    job = agent.run(_ranks(how, 1, quiet_looks=3), NODES)
    assert [job.codes[0], job.codes[2]] == [1, 1] and job.seconds < LIMIT_SECONDS
    assert (
        all(said in line for line in [*job.errors(0), *job.errors(2)]) and len(job.errors(0)) == len(job.errors(2)) == 1
    )
    assert "Traceback" not in "".join(job.wrote)
    assert agent.run(_ranks("none")).codes == [0, 0, 0]


def test_what_only_can_fail_again_ends_those_who_are_started_again(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    assert agent.run(_ranks("disk")).codes == [2, 2, 2]
    assert agent.run(_ranks("none")).codes == [0, 0, 0]  # a disk may be back
    assert agent.run(_ranks("user")).codes == [2, 2, 2]
    again = agent.run(_ranks("none"), NODES)
    assert again.codes == [2, 2, 2]
    assert [*again.errors(0), *again.errors(1)] == again.errors(2) == ["a.parquet: row 3: no number"]


def test_torchrun_finds_the_reason_for_its_summary(tmp_path: Path) -> None:
    Agent(tmp_path).run(_ranks("user"))
    written = [json.loads((tmp_path / f"attempt_0/{rank}/error.json").read_text()) for rank in range(3)]
    assert [record["message"]["message"] for record in written] == ["a.parquet: row 3: no number"] * 3


def _preempted() -> None:
    try:
        with runtime("cpu") as place:
            place.barrier()
            raise Preempted
    except Preempted:
        sys.exit(143)


def test_pre_emption_is_no_failure(tmp_path: Path) -> None:
    job = Agent(tmp_path).run([_preempted] * 2)
    assert job.codes == [143, 143] and not job.errors(0) and not job.errors(1)


def _leave_late(rank: int) -> None:
    failures.SILENT_LOOKS = 2
    with runtime("cpu") as place:
        place.barrier()
        if rank == place.rank:
            signal.sigtimedwait([], 5)


def test_ranks_that_are_done_are_not_missed(tmp_path: Path) -> None:
    job = Agent(tmp_path).run([partial(_leave_late, 0)] * 2)
    assert job.codes == [0, 0] and not job.errors(0)


def _never_come() -> None:
    """A rank that never comes."""


def _arrive(dies: bool) -> None:
    """Meets the others, or dies when it has told them that it is here."""
    if dies:
        signal.setitimer(signal.ITIMER_REAL, 1.0)  # rank 0 is not there to answer
    rank = int(os.environ["RANK"])
    store = meet(rank, int(os.environ["WORLD_SIZE"]))
    if rank == 0:
        store.set("process of rank 0", str(os.getpid()))
    print(store.get("process of rank 0"))


def test_those_who_died_before_are_not_waited_for(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    died = agent.run([_never_come, partial(_arrive, True), partial(_arrive, True)])
    assert died.codes == [0, -signal.SIGALRM, -signal.SIGALRM]
    first, second = (agent.run([partial(_arrive, False)] * 3) for _ in range(2))
    assert first.codes == second.codes == [0, 0, 0]
    assert len(set(first.wrote)) == len(set(second.wrote)) == 1 and first.wrote[0] != second.wrote[0]


def _train(config: Path, run: Path) -> list[str]:
    return ["train", str(config), "train.table_optimizer=rowwise_adagrad", "--run-dir", str(run)]


def test_what_only_one_rank_reads_ends_both(prepared: Path, config: Path, tmp_path: Path) -> None:
    data = damaged(prepared, tmp_path / "damaged")
    job = Agent(tmp_path).run([partial(sseds, *_train(config, tmp_path / "run"), f"data.path={data}")] * 2, [0, 1])
    assert job.codes == [2, 2] and job.seconds < LIMIT_SECONDS
    assert job.errors(0) == job.errors(1) and len(job.errors(0)) == 1, job.wrote
    assert job.errors(0)[0].startswith(f"{data}/train/part-00000.parquet: cannot be read")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("train.epoch=2", "unknown key train.epoch; did you mean"),
        ("--unknown", "No such option: --unknown; see --help"),
    ],
)
@pytest.mark.parametrize("shares_store", [True, False])
def test_what_only_one_rank_is_told_ends_both(
    config: Path, tmp_path: Path, own: str, said: str, shares_store: bool
) -> None:
    train = _train(config, tmp_path / "run")
    told = [partial(sseds, *train, own), partial(sseds, *train)]
    job = Agent(tmp_path, shares_store).run(told[::-1] if shares_store else told, [0, 1])
    assert job.codes == [2, 2] and job.seconds < LIMIT_SECONDS
    assert job.errors(0) == job.errors(1) and len(job.errors(0)) == 1 and said in job.errors(0)[0], job.wrote


def test_a_disk_that_is_full_for_one_rank_ends_both(config: Path, tmp_path: Path) -> None:
    train = _train(config, tmp_path / "run")
    job = Agent(tmp_path).run([partial(sseds, *train), partial(sseds, *train, file_limit=2000)], [0, 1])
    assert job.codes == [2, 2] and job.seconds < LIMIT_SECONDS, job.wrote
    assert job.errors(0) == job.errors(1) and len(job.errors(0)) == 1
    assert "the checkpoint cannot be written ([Errno 27] File too large)" in job.errors(0)[0]


def _killed_after_a_checkpoint(folder: Path, *args: str) -> None:
    def kill() -> None:
        while not list(folder.glob("step-*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    sseds(*args)


def test_a_job_on_raw_ids_ends_with_one_line_when_nodes_come_or_leave(tmp_path: Path) -> None:
    data, config, run = tmp_path / "data", tmp_path / "raw.yaml", tmp_path / "run"
    write_raw_set(data)
    config.write_text(RAW_CONFIG.replace("DATA", str(data)))
    train = ["train", str(config), "train.epochs=20", "train.checkpoint_steps=10", "--run-dir", str(run)]
    agent = Agent(tmp_path)
    killed = agent.run([partial(_killed_after_a_checkpoint, run / "pretrain/checkpoints", *train)] * 2)
    assert killed.codes != [0, 0]
    for nodes in ([0, 0, 1, 1], [0, 0]):  # the second time because of the first
        refused = agent.run([partial(sseds, *train)] * len(nodes), nodes)
        assert set(refused.codes) == {2} and refused.seconds < LIMIT_SECONDS, refused.wrote
        lines = [line for rank in range(len(nodes)) for line in refused.errors(rank)]
        assert len(lines) == len(set(nodes)) and len(set(lines)) == 1
        assert "its map of raw ids is in 2 parts" in lines[0] and "start as many processes, not 4" in lines[0]
