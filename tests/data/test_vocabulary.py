"""Values, buckets and ids, against plain Python."""

import math
from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sseds_rec.data.transforms import FieldSpec, log2_bucket
from sseds_rec.data.vocabulary import EMPTY, RARE, RESERVED, Vocabulary, count_values
from sseds_rec.errors import UserError

WORDS = st.text(alphabet="abcé日 ", min_size=1, max_size=2)
settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")


@given(chunks=st.lists(st.lists(st.none() | WORDS, max_size=40), min_size=1, max_size=3), min_count=st.integers(1, 4))
def test_frequent_values_come_back_and_the_rest_is_rare_or_empty(chunks, min_count):
    counts = None
    for chunk in chunks:
        counts = count_values(pl.Series("word", chunk, pl.String), counts)
    vocabulary = Vocabulary.build(counts, min_count)
    seen = [word for chunk in chunks for word in chunk]
    reference = Counter(word for word in seen if word is not None)

    words = pl.Series("word", [*seen, "never seen"], pl.String)
    ids = vocabulary.encode(words)
    for word, id_, back in zip(words, ids, vocabulary.decode(ids), strict=True):
        if word is None:
            assert id_ == EMPTY
        elif reference[word] < min_count:
            assert id_ == RARE
        else:
            assert id_ >= RESERVED and back == word

    frequent = [(word, count) for word, count in reference.items() if count >= min_count]
    frequent.sort(key=lambda item: (-item[1], item[0].encode()))
    assert vocabulary.table["value"].to_list()[RESERVED:] == [word for word, _ in frequent]
    assert vocabulary.table["id"].to_list() == list(range(vocabulary.cardinality))
    assert vocabulary.table["count"].sum() == len(seen)


@given(st.lists(st.lists(WORDS, max_size=3), min_size=1, max_size=20))
def test_sequences_count_and_encode_their_elements(lists):
    column = pl.Series("tags", lists, pl.List(pl.String))
    vocabulary = Vocabulary.build(count_values(column), min_count=2)
    reference = Counter(word for words in lists for word in words)
    id_of = dict(zip(vocabulary.table["value"][RESERVED:], vocabulary.table["id"][RESERVED:], strict=True))
    assert id_of.keys() == {word for word, count in reference.items() if count >= 2}
    assert vocabulary.encode(column).to_list() == [[id_of.get(word, RARE) for word in words] for words in lists]


@given(st.lists(st.none() | st.integers(-5, 100_000) | st.floats(-1e6, 1e12), min_size=1))
def test_log2_bucket_is_the_scalar_formula(numbers):
    def bucket(x):
        return None if x is None else math.floor(math.log(x) ** 2) if x > 2 else int(x)

    assert log2_bucket(pl.Series("x", numbers, pl.Float64, strict=False)).to_list() == [bucket(x) for x in numbers]


def test_text_is_stripped_split_and_emptied():
    tags = FieldSpec("tags", "sequence").values(pl.Series("tags", [" a | b||", "", None, "a"]), str)
    assert tags.to_list() == [["a", "b"], [], [], ["a"]]
    words = FieldSpec("word").values(pl.Series("word", [" a ", "  ", None]), str)
    assert words.to_list() == ["a", None, None]


def test_dense_numbers_keep_order_and_sign():
    column = pl.Series("x", ["-9", "", "0", "nan", " 99 "])
    dense = FieldSpec("x", "numeric", "log1p").values(column, str)
    assert dense.dtype == pl.Float32
    assert dense.to_list() == pytest.approx([-math.log(10), 0, 0, 0, math.log(100)])


@pytest.mark.parametrize("cell", ["twelve", "inf", "1,5"])
def test_text_in_a_numeric_column_is_refused(cell):
    with pytest.raises(UserError, match=rf"row 1: numeric column 'x' holds '{cell}'"):
        FieldSpec("x", "numeric").values(pl.Series("x", ["1", cell]), lambda index: f"row {index}")
