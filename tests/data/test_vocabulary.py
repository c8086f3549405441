"""Values, buckets and ids, against plain Python."""

import math
import tempfile
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from sseds_rec.data import counting, vocabulary
from sseds_rec.data.cells import Rejects, read_rows
from sseds_rec.data.counting import ValueCounts
from sseds_rec.data.sources import Frame
from sseds_rec.data.transforms import FieldSpec, log2_bucket
from sseds_rec.data.vocabulary import EMPTY, RARE, RESERVED, Vocabulary, hash_ids
from sseds_rec.errors import UserError

WORDS = st.text(alphabet="abcé日 ", min_size=1, max_size=2)
settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")


def build(chunks, min_count, known=None):
    """The vocabulary of a column that comes in chunks."""
    with tempfile.TemporaryDirectory() as folder:
        counts = ValueCounts(["word"], Path(folder) / "spill")
        for chunk in chunks:
            counts.add(chunk.alias("word").to_frame())
        return Vocabulary.build(counts.merged("word"), min_count, known)


def read(spec, column):
    """The values of a field's raw column."""
    return pl.concat(
        chunk.rows for chunk in read_rows(Frame(column.to_frame(), "memory"), [spec], Rejects("refuse", None))
    )


@pytest.fixture(params=["few", "spilled", "indexed"], scope="module", autouse=True)
def ways(request):
    """Counts in memory and on disk; values hashed in every call, and an index that is often made anew."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "spilled":
            patch.setattr(counting, "HELD_VALUES", 3)
        if request.param == "indexed":
            patch.setattr(vocabulary, "_FEW", -1)
            patch.setattr(vocabulary, "_INDEXED_CELLS", 5)
        yield


@given(chunks=st.lists(st.lists(st.none() | WORDS, max_size=40), min_size=1, max_size=3), min_count=st.integers(1, 4))
def test_frequent_values_come_back_and_the_rest_is_rare_or_empty(chunks, min_count):
    vocabulary, counts = build([pl.Series(chunk, dtype=pl.String) for chunk in chunks], min_count)
    seen = [word for chunk in chunks for word in chunk]
    reference = Counter(word for word in seen if word is not None)

    words = pl.Series("word", [*seen, "never seen"], pl.String)
    for again in (1, 2):  # an index has met the unknown values by then
        ids = vocabulary.encode(words)
        for word, id_, back in zip(words, ids, vocabulary.decode(ids), strict=True):
            if word is None:
                assert id_ == EMPTY, again
            elif reference[word] < min_count:
                assert id_ == RARE, again
            else:
                assert id_ >= RESERVED and back == word, again

    frequent = [(word, count) for word, count in reference.items() if count >= min_count]
    frequent.sort(key=lambda item: (-item[1], item[0].encode()))
    assert vocabulary.table["value"].to_list()[RESERVED:] == [word for word, _ in frequent]
    assert vocabulary.table["id"].to_list() == list(range(vocabulary.cardinality))
    assert vocabulary.table["count"].sum() == len(seen)

    assert counts.empty == seen.count(None)
    assert counts.rare == sum(count for count in reference.values() if count < min_count)
    by_magnitude = Counter(10 ** (len(str(count)) - 1) for count in reference.values())
    assert {magnitude.least: magnitude.values for magnitude in counts.magnitudes} == by_magnitude
    assert sum(magnitude.count for magnitude in counts.magnitudes) == reference.total()


@given(st.lists(st.lists(WORDS, max_size=3), min_size=1, max_size=20))
def test_sequences_count_and_encode_their_elements(lists):
    column = pl.Series("tags", lists, pl.List(pl.String))
    vocabulary, _ = build([column], min_count=2)
    reference = Counter(word for words in lists for word in words)
    id_of = dict(zip(vocabulary.table["value"][RESERVED:], vocabulary.table["id"][RESERVED:], strict=True))
    assert id_of.keys() == {word for word, count in reference.items() if count >= 2}
    assert vocabulary.encode(column).to_list() == [[id_of.get(word, RARE) for word in words] for words in lists]


@given(old=st.lists(st.none() | WORDS, max_size=40), new=st.lists(st.none() | WORDS, max_size=40))
def test_a_grown_vocabulary_keeps_its_ids_and_appends(old, new):
    first, _ = build([pl.Series(old, dtype=pl.String)], min_count=2)
    grown, _ = build([pl.Series(new, dtype=pl.String)], min_count=2, known=first)
    before, after = first.table["value"].to_list(), grown.table["value"].to_list()
    assert after[: len(before)] == before
    fresh = Counter(word for word in new if word is not None and word not in before[RESERVED:])
    assert set(after[len(before) :]) == {word for word, count in fresh.items() if count >= 2}
    assert len(set(after[RESERVED:])) == len(after) - RESERVED
    assert grown.table["count"].sum() == len(old) + len(new)
    both = Counter(old) + Counter(new)
    for word, count in grown.table[RESERVED : len(before)].select("value", "count").iter_rows():
        assert count == both[word]


@given(words=st.lists(st.none() | WORDS, max_size=40), rows=st.sampled_from([2, 7, 10**8, 2**40]))
def test_hashed_ids_are_those_of_the_library_whatever_the_chunk(words, rows):
    ids = hash_ids(pl.Series("word", words, pl.String), rows)
    expected = [0 if word is None else 1 + xxhash.xxh3_64(word.encode()).intdigest() % (rows - 1) for word in words]
    assert ids.to_list() == expected and all(0 <= id_ < rows for id_ in expected)
    assert ids.dtype == (pl.Int64 if rows > 2**31 else pl.Int32)
    lists = hash_ids(pl.Series("tags", [[word for word in words if word], []], pl.List(pl.String)), rows)
    assert lists.to_list() == [[id_ for id_ in expected if id_], []]


@given(st.lists(st.none() | st.integers(-5, 100_000) | st.floats(-1e6, 1e12), min_size=1))
def test_log2_bucket_is_the_scalar_formula(numbers):
    def bucket(x):
        return None if x is None else math.floor(math.log(x) ** 2) if x > 2 else int(x)

    column = pl.Series("x", numbers, pl.Float64, strict=False)
    assert pl.select(log2_bucket(pl.lit(column))).to_series().to_list() == [bucket(x) for x in numbers]


def test_text_is_stripped_split_and_emptied():
    tags = read(FieldSpec("tags", "sequence"), pl.Series("tags", [" a | b||", "", None, "a"]))
    assert tags["tags"].to_list() == [["a", "b"], [], [], ["a"]]
    words = read(FieldSpec("word"), pl.Series("word", [" a ", "  ", None]))
    assert words["word"].to_list() == ["a", None, None]


def test_dense_numbers_keep_order_and_sign():
    dense = read(FieldSpec("x", "numeric", "log1p"), pl.Series("x", ["-9", "", "0", "nan", " 99 "]))["x"]
    assert dense.dtype == pl.Float32
    assert dense.to_list() == pytest.approx([-math.log(10), 0, 0, 0, math.log(100)])


@pytest.mark.parametrize("cell", ["twelve", "inf", "1,5"])
def test_text_in_a_numeric_column_is_refused(cell):
    with pytest.raises(UserError, match=rf"memory, row 2: numeric column 'x' holds '{cell}'"):
        read(FieldSpec("x", "numeric"), pl.Series("x", ["1", cell]))


def test_raw_ids_are_64_bits():
    cells = pl.Series("user", ["0", "-5", str(2**63 - 1), str(2**64 - 1), None, " 7 "])
    ids = read(FieldSpec("user", transform="raw", rows=10), cells)["user"]
    assert ids.to_list() == [0, -5, 2**63 - 1, -1, None, 7]
    unsigned = read(FieldSpec("user", transform="raw", rows=10), pl.Series("user", [3, 2**64 - 2], pl.UInt64))["user"]
    assert unsigned.to_list() == [3, -2]
