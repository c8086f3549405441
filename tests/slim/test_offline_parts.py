"""Conversions in dozens of parts: by several processes, and gone on with after kills; against what one process makes at once."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

import sseds_rec as sr
from sseds_rec.slim.offline.job import Job, locked
from tests.ranks import run_ranks
from tests.slim.checkpoints import (
    TABLES,
    assert_same,
    digest,
    entries,
    full_state,
    plan_of,
    slim_entries,
    small_parts,
)
from tests.slim.rotations import draw_rotation

ROOT = Path(__file__).parents[2]
OTHER = plan_of({**TABLES, "c": (64, 16, [0, 3])})


@pytest.fixture(autouse=True)
def _parts_are_small() -> Iterator[None]:
    with small_parts():
        yield


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A checkpoint."""
    dcp.save(full_state(), checkpoint_id=tmp_path / "full")
    return tmp_path / "full"


class _Stop(Exception):
    """Ends a conversion as a kill does: nothing is tidied up."""


def _some(job: Job, share: int, shares: int, count: int) -> None:
    made = []

    def done() -> None:
        made.append(1)
        if len(made) == count:
            raise _Stop

    with contextlib.suppress(_Stop):
        job.work(share, shares, done)


@pytest.mark.parametrize("rotated", [False, True])
def test_shares_in_any_order_make_what_one_process_makes(tmp_path: Path, full: Path, rotated: bool) -> None:
    plan = plan_of(rotations={"c": draw_rotation(16, 0).keep(TABLES["c"][2])} if rotated else {})
    sr.slim_checkpoint(full, tmp_path / "one", plan, processes=1)
    folder = tmp_path / "job"
    folder.mkdir()
    parts = len(Job.begin(folder, full, plan).missing)
    assert parts > 40
    for share, count in ((2, 15), (1, 4), (2, 3), (0, parts)):
        before = len(Job.join(folder).missing)
        _some(Job.join(folder), share, 3, count)
        assert len(Job.join(folder).missing) == max(before - count, 0)
    job = Job.join(folder)
    job.finish([])
    job.publish(tmp_path / "three")
    one = entries(tmp_path / "one")
    assert_same(entries(tmp_path / "three"), one)
    if not rotated:
        assert_same(one, slim_entries(entries(full)))
    chunks = FileSystemReader(tmp_path / "one").read_metadata().state_dict_metadata["model.ebc.embedding_bags.c.weight"]
    assert {tuple(chunk.sizes) for chunk in chunks.chunks} <= {(5, 8), (4, 8)}  # type: ignore[union-attr]


def _python(path: Path, *lines: str) -> str:
    """Makes a command that stands in for Python where a helper is started."""
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return str(path)


def test_helpers_make_parts_too(tmp_path: Path, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = _python(
        tmp_path / "helper",
        f"#!{sys.executable}",
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        "from tests.slim.checkpoints import small_parts",
        "from sseds_rec.slim.offline.helper import main",
        "with small_parts(): main(*sys.argv[3:])",
    )
    monkeypatch.setattr(sys, "executable", helper)
    own: list[int] = []

    def wait_for_a_helper(done: int, of: int) -> None:
        own.append(done)
        begun = time.monotonic()
        while len(own) > 1 and len(list((tmp_path / ".slim.converting").glob("part-*.json"))) < len(own):
            assert time.monotonic() - begun < 60
            time.sleep(0.01)

    sr.slim_checkpoint(full, tmp_path / "slim", plan_of(), processes=3, on_progress=wait_for_a_helper)
    assert own[0] == 0 and len(own) - 1 < len(list((tmp_path / "slim").glob("*.distcp")))
    assert_same(entries(tmp_path / "slim"), slim_entries(entries(full)))


def _together(rank: int, world_size: int, full: str, slim: str) -> tuple[list[int], str]:
    made: list[int] = []
    with small_parts():
        sr.slim_checkpoint(full, slim, plan_of(), collective=True, on_progress=lambda done, of: made.append(done))
        with pytest.raises(sr.UserError) as again:
            sr.slim_checkpoint(full, slim, plan_of(), collective=True)
    return made, str(again.value)


def test_ranks_convert_together(tmp_path: Path, full: Path) -> None:
    answers = run_ranks(2, _together, str(full), str(tmp_path / "slim"))
    parts = len(list((tmp_path / "slim").glob("*.distcp")))
    (first, _), (second, _) = answers
    # The first rank is told of all parts after each of its own, a share of them; the other makes the rest, and is not told.
    assert parts / 4 < len(first) - 1 < parts and first[-1] > len(first) - 1 and second == []
    assert all(said == f"{tmp_path / 'slim'}: exists already; remove it or choose another" for _, said in answers)
    assert_same(entries(tmp_path / "slim"), slim_entries(entries(full)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "slim"]


def _fails_together(rank: int, world_size: int, full: str, slim: str) -> str:
    with small_parts(), pytest.raises(sr.UserError) as refused:
        sr.slim_checkpoint(full, slim, plan_of(), collective=True)
    return str(refused.value)


def test_ranks_fail_together(tmp_path: Path, full: Path) -> None:
    content = full_state()["model"]["ebc.embedding_bags.c.weight"].numpy().tobytes()
    (path,) = full.glob("*.distcp")
    path.write_bytes(path.read_bytes().replace(content, content[:-1] + bytes([content[-1] ^ 1])))
    said = run_ranks(2, _fails_together, str(full), str(tmp_path / "slim"))
    assert set(said) == {
        f"{path}: the bytes of model.ebc.embedding_bags.c.weight are not those that were saved; "
        "the checkpoint is damaged, restore it"
    }
    assert [own.name for own in tmp_path.iterdir()] == ["full"]


def _parts(folder: Path) -> dict[str, tuple[int, int]]:
    """Data file -> identity and time of change, of the parts that are done."""
    done = [f"__{path.stem.split('-')[1]}_0.distcp" for path in folder.glob("part-*.json")]
    return {name: ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) for name in done}


KILLS = """
import json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
import sseds_rec as sr
from tests.slim.checkpoints import plan_of, small_parts
from tests.slim.test_offline_parts import _parts
from pathlib import Path

full, slim = Path(sys.argv[2]), Path(sys.argv[3])
folder = slim.with_name(f".{slim.name}.converting")
torch.set_num_threads(1)
draw = random.Random(0)
snapshots = []

def start():
    child = os.fork()
    if not child:
        with small_parts():
            sr.slim_checkpoint(full, slim, plan_of(), processes=1, on_progress=lambda done, of: time.sleep(0.02))
        os._exit(0)
    return child

while len(snapshots) < 6 or len(snapshots[-1]) <= 5:  # a busy machine wants more tries, and longer ones
    child = start()
    time.sleep(draw.uniform(0.05, 0.35) * max(1, len(snapshots) - 5))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not slim.exists()
    snapshots.append(_parts(folder))
assert os.waitpid(start(), 0)[1] == 0
print(json.dumps(snapshots))
"""


def test_killed_at_random_it_goes_on_from_the_parts_that_are_done(tmp_path: Path, full: Path) -> None:
    before = digest(full)
    command = [sys.executable, "-W", "ignore", "-c", KILLS, ROOT, full, tmp_path / "slim"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    snapshots = json.loads(done.stdout)
    assert len(snapshots[-1]) > 5 and [len(s) for s in snapshots] == sorted(len(s) for s in snapshots)
    for snapshot in snapshots:
        for name, (node, changed) in snapshot.items():
            stat = (tmp_path / "slim" / name).stat()
            assert (stat.st_ino, stat.st_mtime_ns) == (node, changed)
    assert_same(entries(tmp_path / "slim"), slim_entries(entries(full)))
    assert digest(full) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "slim"]


KILLS_AT_EVERY_STEP = """
import os, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
import sseds_rec as sr
from tests.slim.checkpoints import TABLES, assert_same, digest, entries, plan_of, slim_entries
from pathlib import Path

full, slim = Path(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
before, expected = digest(full), slim_entries(entries(full))
sr.slim_checkpoint(full, slim, plan_of(), processes=1)  # what is imported late is imported once
shutil.rmtree(slim)

def convert(kill_at):
    child = os.fork()
    if not child:
        seen = 0
        def count(event, args):
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir"):
                if any(str(slim.parent) in str(arg) and not str(arg).startswith(str(full)) for arg in args[:2]):
                    seen += 1
                    if seen == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        sr.slim_checkpoint(full, slim, plan_of(), processes=1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

step = -2
while True:
    step += 3
    ended = convert(step)
    if ended == 0:
        break
    assert ended == signal.SIGKILL, ended
    if not slim.exists():
        assert convert(0) == 0
    assert_same(entries(slim), expected)
    assert sorted(path.name for path in slim.parent.iterdir()) == ["full", "slim"]
    shutil.rmtree(slim)
assert digest(full) == before
print(step)
"""


def test_killed_before_every_third_of_its_file_operations_it_goes_on(tmp_path: Path, full: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLS_AT_EVERY_STEP, ROOT, full, tmp_path / "slim"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60


def _stop_after(count: int) -> Any:
    calls: list[int] = []

    def stop(done: int, of: int) -> None:
        calls.append(done)
        if len(calls) > count:
            raise _Stop

    return stop


def test_what_another_plan_or_source_left_is_not_used(tmp_path: Path, full: Path) -> None:
    with pytest.raises(_Stop):
        sr.slim_checkpoint(full, tmp_path / "slim", OTHER, on_progress=_stop_after(30))
    assert len(_parts(tmp_path / ".slim.converting")) == 30
    with pytest.raises(_Stop):
        sr.slim_checkpoint(full, tmp_path / "slim", plan_of(), on_progress=_stop_after(20))
    assert len(_parts(tmp_path / ".slim.converting")) == 20
    dcp.save(full_state(seed=9), checkpoint_id=full)
    sr.slim_checkpoint(full, tmp_path / "slim", plan_of())
    assert_same(entries(tmp_path / "slim"), slim_entries(entries(full)))


def test_a_killed_helper_loses_nothing_that_is_done(
    tmp_path: Path, full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", _python(tmp_path / "helper", "#!/bin/sh", "sleep 0.1; kill -9 $$"))
    with pytest.raises(sr.UserError, match="a process of the conversion was ended by signal 9; the same call goes on"):
        sr.slim_checkpoint(full, tmp_path / "slim", plan_of(), processes=2)
    assert not (tmp_path / "slim").exists()
    parts = _parts(tmp_path / ".slim.converting")
    assert parts
    sr.slim_checkpoint(full, tmp_path / "slim", plan_of(), processes=1)
    assert all((tmp_path / "slim" / name).stat().st_mtime_ns == changed for name, (_, changed) in parts.items())
    assert_same(entries(tmp_path / "slim"), slim_entries(entries(full)))


def test_what_a_helper_fails_with_is_said(tmp_path: Path, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = _python(tmp_path / "helper", "#!/bin/sh", "echo 'full/x.distcp: it ends early' >&2; exit 1")
    monkeypatch.setattr(sys, "executable", helper)
    with pytest.raises(sr.UserError, match="^full/x.distcp: it ends early$"):
        sr.slim_checkpoint(full, tmp_path / "slim", plan_of(), processes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "helper"]


def test_two_conversions_to_one_place_do_not_meet(tmp_path: Path, full: Path) -> None:
    with locked(tmp_path / ".slim.converting"):
        (tmp_path / ".slim.converting" / "part").touch()
        with pytest.raises(sr.UserError, match="slim.converting: another process is converting to the same place"):
            sr.slim_checkpoint(full, tmp_path / "slim", plan_of())
        assert (tmp_path / ".slim.converting" / "part").exists()
    sr.slim_checkpoint(full, tmp_path / "slim", plan_of())
    assert (tmp_path / "slim" / ".metadata").exists()
