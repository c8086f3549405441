"""The loader: every row once, on any number of ranks, in any order, across interruptions."""

import itertools
import json
import threading
import time
from collections import Counter

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.streamable import Pipelineable

from sseds_rec.data import loader as loader_module
from sseds_rec.data import npy, parquet
from sseds_rec.data.batch import Batch
from sseds_rec.data.dataset import open_dataset
from sseds_rec.data.loader import Loader
from sseds_rec.data.parquet import ParquetBlocks
from sseds_rec.data.schema import Schema
from sseds_rec.errors import UserError
from tests.data import sets
from tests.data.sets import ROWS, rows_of

TRAIN = ROWS["train"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """1,003 train rows in 3 parts of 4 or fewer row groups; every row has its own id, and tags that follow from it."""
    path = tmp_path_factory.mktemp("plain")
    sets.write("plain", path)
    return path


@pytest.fixture(scope="module", params=sets.KINDS)
def opened(request, tmp_path_factory):
    """A data set of every format, and its train rows."""
    config, rows = sets.write(request.param, tmp_path_factory.mktemp(request.param))
    return open_dataset(config), rows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(loader_module, "SHUFFLE_ROWS", 250)
    monkeypatch.setattr(npy, "BLOCK_ROWS", 100)
    monkeypatch.setattr(parquet, "BLOCK_ROWS", 100)  # the foreign set's row groups are larger: they are read in pieces
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 30)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 64), (3, 1), (3, 64), (7, 1), (7, 5000)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_the_rows_and_take_equally_many_batches(opened, world_size, shuffle, batch_size):
    dataset, stored = opened
    seen, lengths = [], set()
    for rank in range(world_size):
        loader = Loader(dataset, "train", batch_size, rank=rank, world_size=world_size, shuffle=shuffle)
        batches = list(loader)
        sizes = [len(batch.labels) for batch in batches]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1 and max(sizes) <= batch_size + (batch_size == 1)
        assert sum(sizes) in (TRAIN // world_size, TRAIN // world_size + 1)
        lengths |= {len(loader), len(batches)}
        seen += rows_of(batches)
    assert len(lengths) == 1
    assert Counter(seen) == Counter(stored)
    if not shuffle:
        assert seen == stored


def test_drop_last_gives_full_batches_only(opened):
    dataset, stored = opened
    seen = []
    for rank in range(3):
        batches = list(Loader(dataset, "train", 50, rank=rank, world_size=3, shuffle=True, drop_last=True))
        assert [len(batch.labels) for batch in batches] == [50] * 6
        seen += rows_of(batches)
    assert len(seen) == 900 and not Counter(seen) - Counter(stored)


def test_the_order_follows_from_seed_and_epoch(folder):
    def order(seed, epoch, prefetch=2):
        loader = Loader(folder, "train", 64, seed=seed, shuffle=True, prefetch=prefetch)
        loader.set_epoch(epoch)
        return [ids[0] for _, _, ids, _ in rows_of(loader)]

    first = order(1, 0)
    assert first == order(1, 0) == order(1, 0, prefetch=0)
    others = [order(1, 1), order(2, 0)]
    assert all(sorted(other) == sorted(first) and other != first for other in others)
    inside = [ids[0] for _, _, ids, _ in rows_of([next(iter(Loader(folder, "train", 64)))])]
    for one in (first, *others):  # shuffled inside the buffer, not only by row group
        assert len(set(one[:64]) & set(inside)) < 40


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("stop", [0, 5, "end"])
def test_a_restored_loader_goes_on_with_the_rows_not_yet_seen(opened, world_size, stop):
    dataset, stored = opened
    seen = []
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "shuffle": True, "seed": 9}
        whole = Loader(dataset, "train", 32, **options)
        whole.set_epoch(4)
        expected = rows_of(whole)

        interrupted = Loader(dataset, "train", 32, **options)
        interrupted.set_epoch(4)
        stop_at = len(interrupted) if stop == "end" else stop
        before = rows_of(itertools.islice(interrupted, stop_at))
        state = interrupted.state_dict()
        resumed = Loader(dataset, "train", 32, **options)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        resumed.set_epoch(4)  # as a trainer does at the start of the epoch it is in
        after = rows_of(resumed)
        assert before + after == expected
        assert rows_of(resumed) == expected  # only the first iteration is partial
        seen += before + after
    assert Counter(seen) == Counter(stored)


GLOBAL_BATCH = 24


def interrupted_epoch(dataset, sessions, **options):
    """The rows of an epoch in which every session's ranks take a number of batches (None: all), and then others go on.

    Sessions are (ranks, batches); returns the rows in the order of steps, and the number of steps of each session.
    """
    state, seen, steps = None, [], []
    for world_size, count in sessions:
        batches = []
        for rank in range(world_size):
            loader = Loader(
                dataset, "train", GLOBAL_BATCH // world_size, rank=rank, world_size=world_size, seed=5, **options
            )
            loader.set_epoch(3)
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
                loader.set_epoch(3)
            first = loader.state_dict()["batch"]
            batches.append(list(itertools.islice(loader, count)))
            after = loader.state_dict()
            assert after["batch"] == first + len(batches[0])
            if count is None:
                assert after["batch"] == len(loader)
        state = after
        steps.append(len(batches[0]))
        for step in zip(*batches, strict=True):
            assert {len(batch.labels) for batch in step} == {GLOBAL_BATCH // world_size} or not options["drop_last"]
            seen += rows_of(step)
    return seen, steps


CHANGES = [
    [(2, 7), (1, None)],
    [(1, 7), (2, None)],
    [(2, 1), (3, None)],
    [(2, 0), (3, 4), (3, None)],
    [(3, 20), (2, 0), (4, 5), (1, 3), (2, None)],
]


@pytest.mark.parametrize("sessions", CHANGES)
@pytest.mark.parametrize("shuffle", [False, True])
def test_other_numbers_of_ranks_go_on_with_every_row_not_yet_seen(opened, sessions, shuffle):
    dataset, stored = opened
    seen, steps = interrupted_epoch(dataset, sessions, shuffle=shuffle, drop_last=True)
    assert not Counter(seen) - Counter(stored)  # none twice
    assert len(stored) - len(seen) < GLOBAL_BATCH + sessions[-1][0]  # what does not fill a last batch
    assert sum(steps) in (TRAIN // GLOBAL_BATCH, TRAIN // GLOBAL_BATCH - 1)
    whole, _ = interrupted_epoch(dataset, sessions, shuffle=shuffle, drop_last=False)
    assert Counter(whole) == Counter(stored)


def test_an_interruption_among_the_same_ranks_changes_no_batch(folder):
    sessions = [(2, 7), (3, 9), (3, 2), (3, None)]
    assert (
        interrupted_epoch(folder, sessions, shuffle=True, drop_last=True)[0]
        == (interrupted_epoch(folder, [(2, 7), (3, None)], shuffle=True, drop_last=True)[0])
    )


def test_rows_left_over_by_other_ranks_stay_in_their_order(folder):
    seen, _ = interrupted_epoch(folder, [(2, 7), (1, None)], shuffle=True, drop_last=True)
    rest = []
    for rank in range(2):
        loader = Loader(folder, "train", 12, rank=rank, world_size=2, seed=5, shuffle=True)
        loader.set_epoch(3)
        rest += rows_of(loader)[7 * 12 :]
    assert seen[2 * 7 * 12 :] == rest[: len(seen) - 2 * 7 * 12]


def test_the_next_epoch_is_divided_afresh(folder):
    first = Loader(folder, "train", 12, world_size=2, shuffle=True)
    next(iter(first))
    loader = Loader(folder, "train", 24, shuffle=True)
    loader.load_state_dict(first.state_dict())
    list(loader)
    fresh = Loader(folder, "train", 24, shuffle=True)
    assert rows_of(loader) == rows_of(fresh)  # the same epoch again
    for each in (loader, fresh):
        each.set_epoch(1)
    assert len(loader) == len(fresh) and rows_of(loader) == rows_of(fresh)


def test_state_counts_what_was_handed_out_not_what_was_read_ahead(folder):
    loader = Loader(folder, "train", 32, prefetch=4)
    batches = iter(loader)
    next(batches), next(batches)
    time.sleep(0.05)
    assert loader.state_dict()["batch"] == 2
    assert loader.state_dict(trained=1)["batch"] == 1  # a pipeline holds the other one
    loader.set_epoch(1)
    assert loader.state_dict()["batch"] == 0


def test_a_state_of_other_settings_is_refused(folder):
    state = Loader(folder, "train", 32, shuffle=True).state_dict()
    with pytest.raises(UserError, match="batch_size was 32, now 16"):
        Loader(folder, "train", 16, shuffle=True).load_state_dict(state)
    with pytest.raises(UserError, match="batch_size was 32, now 64"):  # rows a step over all ranks
        Loader(folder, "train", 32, shuffle=True, world_size=2).load_state_dict(state)
    with pytest.raises(UserError, match="3 processes cannot have had 99 batches of 1003 rows"):
        thrice = {**state, "batch": 99, "world_size": 3}
        Loader(folder, "train", 16, shuffle=True, world_size=2).load_state_dict(thrice)
    with pytest.raises(UserError, match="batch 99 is no position in 32 batches"):
        Loader(folder, "train", 32, shuffle=True).load_state_dict({**state, "batch": 99})


def test_batches_are_what_a_pipeline_takes(folder):
    batch = next(iter(Loader(folder, "train", 32)))
    assert isinstance(batch, Pipelineable)
    assert batch.sparse.keys() == ["row", "city", "tags"]
    assert batch.sparse.values().dtype == torch.int64 and batch.sparse.lengths().dtype == torch.int32
    assert batch.sparse.stride() == len(batch.labels) and batch.dense.shape == (len(batch.labels), 1)
    assert batch.dense.dtype == batch.labels.dtype == torch.float32
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert {moved.dense.device.type, moved.sparse.values().device.type, moved.labels.device.type} == {"meta"}


def test_batches_are_pinned_in_the_thread_that_makes_them(folder, monkeypatch):
    threads = []
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: threads.append(threading.current_thread()) or batch)
    batches = list(Loader(folder, "train", 500, pin_memory=True))
    assert len(threads) == len(batches) == 3 and threading.current_thread() not in threads
    list(Loader(folder, "train", 500))
    assert len(threads) == 3


def test_the_thread_ends_with_its_iterator(folder):
    before = threading.active_count()
    batches = iter(Loader(folder, "train", 4, prefetch=1))
    next(batches)
    assert threading.active_count() == before + 1
    del batches
    assert threading.active_count() == before


def damaged(folder, copy, change):
    """A copy of the set with one part of train replaced by `change(table)`."""
    schema = Schema.load(folder)
    for split in schema.splits.values():
        for file in split.files:
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).write_bytes((folder / file).read_bytes())
    schema.save(copy)
    victim = copy / schema.splits["train"].files[1]
    changed = change(pl.from_arrow(pq.read_table(victim)))
    if changed is None:
        victim.unlink()
    else:
        changed.write_parquet(victim, row_group_size=100)
    return copy


def at(row, column, value):
    """Sets one cell, counted from 1."""
    return lambda t: t.with_columns(
        pl.when(pl.int_range(pl.len()) == row - 1).then(value).otherwise(column).alias(column)
    )


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            at(205, "row", pl.lit(5000, pl.Int32)),
            r"part-00001.parquet, row 205: field 'row': id 5000 is outside .* 1005 rows",
        ),
        (
            at(7, "city", pl.lit(-1, pl.Int32)),
            "part-00001.parquet, row 7: field 'city': id -1 is outside its table of 4 rows",
        ),
        (
            at(103, "tags", pl.lit([2, 9], pl.List(pl.Int32))),
            "part-00001.parquet, row 103: field 'tags': id 9 is outside",
        ),
        (at(150, "label", pl.lit(2, pl.Int8)), "part-00001.parquet, row 150: label 2 is neither 0 nor 1"),
        (at(150, "city", None), "part-00001.parquet, row 150: 'city' is empty"),
        (lambda t: t.drop("city"), "part-00001.parquet: no column 'city'"),
        (lambda t: t.cast({"city": pl.String}), "part-00001.parquet: column 'city' holds .*string, not integers"),
        (at(150, "price", pl.lit(float("nan"), pl.Float32)), "part-00001.parquet, row 150: 'price' is nan"),
        (at(7, "tags", pl.lit([1, None], pl.List(pl.Int32))), "part-00001.parquet, row 7: 'tags' has an empty element"),
        (lambda t: t.head(50), "the train files hold 653 rows, schema.json says 1003"),
        (lambda t: None, "part-00001.parquet: no such file"),
    ],
)
def test_damaged_files_are_one_line_in_the_consumer(folder, tmp_path, change, message, prefetch):
    with pytest.raises(UserError, match=message) as refused:
        list(Loader(damaged(folder, tmp_path / "copy", change), "train", 64, prefetch=prefetch))
    assert "\n" not in str(refused.value)


def test_too_few_rows_are_refused_before_anything_hangs(folder):
    with pytest.raises(UserError, match="the test split has 10 rows, fewer than the 11 processes"):
        Loader(folder, "test", 4, world_size=11)
    with pytest.raises(UserError, match="batch size 6 is more than a process's 5 rows of test"):
        Loader(folder, "test", 6, world_size=2, drop_last=True)
    with pytest.raises(UserError, match="batch size 0"):
        Loader(folder, "test", 0)
    with pytest.raises(UserError, match="split 'dev': must be one of train, validation, test"):
        Loader(folder, "dev", 4)


@pytest.mark.parametrize("shuffle", [False, True])
def test_only_the_row_groups_that_are_needed_are_read(folder, monkeypatch, shuffle):
    read, opened = ParquetBlocks.read, []
    monkeypatch.setattr(ParquetBlocks, "read", lambda groups, index: opened.append(index) or read(groups, index))
    sizes = Loader(folder, "train", 32)._blocks.sizes  # 11 row groups of 100 rows or less

    for rank in range(3):
        opened.clear()
        list(Loader(folder, "train", 32, rank=rank, world_size=3, shuffle=shuffle))
        assert len(opened) == len(set(opened)) <= 6 < len(sizes)
    loader = Loader(folder, "train", 32, shuffle=shuffle)
    loader.load_state_dict({**loader.state_dict(), "batch": len(loader) - 1})
    opened.clear()
    list(loader)
    assert 1 <= len(opened) <= 3
