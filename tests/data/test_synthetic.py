"""The synthetic recipe, against brute force, scipy and scikit-learn."""

import json
import os
import tracemalloc

import numpy as np
import polars as pl
import pytest
from scipy.stats import chi2_contingency, chisquare
from sklearn.metrics import log_loss, roc_auc_score

from sseds_rec.data.planted import plant
from sseds_rec.data.prepare import load_vocabulary
from sseds_rec.data.schema import SPLITS, Schema
from sseds_rec.data.synthetic import SyntheticRows, measure_truth, prepare_synthetic
from sseds_rec.data.truth import Truth
from sseds_rec.data.zipf import Zipf
from sseds_rec.errors import UserError

RANKS = [0, 1, 3, 4, 0, 2, 8, 1]
OPTIONS = {"rows": 30_000, "fields": 10, "cardinality": "12:2000", "ranks": RANKS, "duplicates": 2, "signal": 2.0}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    return folder, prepare_synthetic(folder, **OPTIONS, positive_rate=0.3, min_count=1, seed=5)


@pytest.fixture(scope="module")
def truth(prepared):
    return Truth.load(prepared[0])


@pytest.fixture(scope="module")
def rows(truth):
    """All rows as they were drawn, with what is hidden from a model."""
    source = SyntheticRows(truth, OPTIONS["rows"])
    return pl.concat([chunk.frame for chunk in source.chunks(source.columns)])


def named(truth, name):
    return next(field for field in truth.fields if field.name == name)


@pytest.mark.parametrize(
    ("values", "exponent"), [(1, 1.05), (7, 0.0), (40, 1.0), (10**6, 1.05), (10**9, 1.3), (9, 3.0)]
)
def test_zipf_draws_follow_the_law(values, exponent):
    law = Zipf(values, exponent)
    drawn = law.draw(np.random.default_rng(1), 200_000)
    assert drawn.min() >= 0 and drawn.max() < values
    head = min(values, 40)
    terms = np.arange(1, min(values, 10**6) + 1, dtype=float) ** -exponent
    probabilities = law.probabilities(0, head)
    if values <= 10**6:
        assert probabilities == pytest.approx(terms[:head] / terms.sum(), rel=1e-9)
    expected = np.append(probabilities, max(1 - probabilities.sum(), 0)) * len(drawn)
    found = np.bincount(np.minimum(drawn, head), minlength=head + 1)
    some = expected > 1
    assert found[~some].sum() <= 20
    if some.sum() > 1:
        assert chisquare(found[some], expected[some] * found[some].sum() / expected[some].sum()).pvalue > 1e-3


def test_popularity_of_the_rows_has_zipf_slope(truth, rows):
    counts = rows["f08"].value_counts(sort=True)["count"].to_numpy()[:30]
    slope = np.polyfit(np.log(np.arange(1, 31)), np.log(counts), 1)[0]
    assert slope == pytest.approx(-truth.zipf, abs=0.1)
    popular = rows["f08"].value_counts(sort=True)["f08"][:30]
    assert not popular.is_sorted() and popular.n_unique() == 30


def test_prepared_rows_are_the_drawn_ones(prepared, rows):
    folder, schema = prepared
    names = [field.name for field in schema.fields]
    assert names == [f"f{number:02}" for number in range(1, 11)]
    for split, size in zip(SPLITS, (24_000, 3000, 3000), strict=True):
        stored = pl.concat([pl.read_parquet(folder / file) for file in schema.splits[split].files])
        assert len(stored) == size
        values = stored.select(
            pl.col("label").cast(pl.Int8),
            *(
                load_vocabulary(folder, field).decode(stored[field.name]).cast(pl.Int64).alias(field.name)
                for field in schema.fields
            ),
        )
        drawn = rows.filter(pl.col("split") == split).select("label", *names)
        if split != "train":  # values that train lacks cannot be told from each other
            seen = {name: rows.filter(pl.col("split") == "train")[name].unique().to_list() for name in names}
            drawn = drawn.with_columns(pl.when(pl.col(name).is_in(seen[name])).then(name) for name in names)
        assert values.sort(values.columns).equals(drawn.sort(values.columns))


def test_probabilities_agree_with_brute_force_from_the_files(prepared, truth, rows):
    folder, _ = prepared
    known = json.loads((folder / "truth.json").read_text())
    arrays = np.load(folder / "truth.npz")
    informative = [field["name"] for field in known["fields"] if field["rank"]]
    for row in rows[::1500].iter_rows(named=True):
        logit, vectors = known["bias"], []
        for name in informative:
            (z,) = truth.latents(name, truth.popularity(name, [row[name]]))
            logit += arrays[f"{name}.first_order"] @ z
            vectors.append(arrays[f"{name}.embedding"] @ z)
        for i, left in enumerate(vectors):
            for right in vectors[:i]:
                logit += left @ right
        assert row["probability"] == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-4)
        text = pl.DataFrame({name: [str(row[name])] for name in informative})  # as vocabularies hold them
        assert truth.logits(text) == pytest.approx([logit])


def test_latents_are_white_over_the_rows(truth):
    for name in truth.effects:
        cardinality = named(truth, name).cardinality
        p = np.arange(1, cardinality + 1) ** -truth.zipf
        p /= p.sum()
        z = truth.latents(name, np.arange(cardinality))
        assert p @ z == pytest.approx(np.zeros(z.shape[1]), abs=1e-9)
        assert z.T @ (z * p[:, None]) == pytest.approx(np.eye(z.shape[1]), abs=1e-9)


def test_latents_of_very_many_values_are_white_too():
    truth = plant([10**7, 10**7], [3, 3], 0, zipf=0.9, signal=1.0, positive_rate=0.5, seed=0)
    z = truth.latents("f02", Zipf(10**7, 0.9).draw(np.random.default_rng(1), 400_000))
    assert z.mean(axis=0) == pytest.approx(np.zeros(3), abs=0.01)
    assert np.cov(z.T) == pytest.approx(np.eye(3), abs=0.01)


def test_signal_and_positive_rate_are_those_asked_for(truth, rows):
    logits = truth.logits(rows)
    assert logits.std() == pytest.approx(2.0, rel=0.03) and logits.mean() == pytest.approx(truth.bias, abs=0.05)
    assert rows["probability"].mean() == pytest.approx(0.3, abs=0.005)
    assert rows["label"].mean() == pytest.approx(0.3, abs=0.01)
    ten = np.digitize(rows["probability"], np.linspace(0, 1, 11)[1:-1])
    for decile in range(10):  # the labels mean the probabilities
        mine = rows.filter(ten == decile)
        assert mine["label"].mean() == pytest.approx(mine["probability"].mean(), abs=4 * 0.5 / len(mine) ** 0.5)


@pytest.mark.parametrize("number", range(10))
def test_rank_of_each_effect_is_the_planted_one(truth, rows, number):
    """Logits of 400 values in 400 contexts: the singular values are those of the spectrum, and no others."""
    field = truth.fields[number]
    values, contexts = rows[:400], rows[-400:]
    crossed = contexts.select(pl.all().repeat_by(400).explode()).with_columns(
        pl.concat([values[field.name]] * 400).alias(field.name)
    )
    effect = truth.logits(crossed).reshape(400, 400).T  # values x contexts
    effect -= effect.mean(axis=0)
    singular = np.linalg.svd(effect, compute_uv=False)
    assert (singular > 1e-6 * 400).sum() == field.rank == [*RANKS, 0, 0][number]
    found = np.square(singular[: field.rank]) / (400 * 400 * truth.signal**2)
    assert len(field.spectrum) == field.rank
    if field.rank:
        assert found.sum() == pytest.approx(sum(field.spectrum), rel=0.35)
        assert field.spectrum[-1] > 0.005 and found[-1] > 0.2 * field.spectrum[-1]


def test_shares_are_of_the_variance(truth, rows):
    """What a field's own variance and half its interactions make of the logit's, by permuting its column."""
    assert sum(field.share for field in truth.fields) == pytest.approx(1)
    logits = truth.logits(rows)
    generator = np.random.default_rng(0)
    for name in truth.effects:
        others = rows.with_columns(pl.Series(name, generator.permutation(rows[name])))
        total = np.mean((logits - truth.logits(others)) ** 2) / 2  # total Sobol index (Jansen, 1999)
        assert total / truth.signal**2 == pytest.approx(sum(named(truth, name).spectrum), rel=0.1)


def test_noise_does_not_touch_the_label_and_the_others_do(truth, rows):
    for field in truth.fields:
        common = rows.filter(pl.len().over(field.name) >= 200)
        table = common.pivot("label", index=field.name, values="probability", aggregate_function="len").drop(field.name)
        p = chi2_contingency(table.fill_null(0).to_numpy()).pvalue
        if field.rank or field.duplicate_of:
            assert p < 1e-6, field.name
        else:
            assert p > 1e-3, field.name


def test_duplicates_rename_the_values_of_their_originals(truth, rows):
    originals = [field.duplicate_of for field in truth.fields[-2:]]
    assert len(set(originals)) == 2 and all(named(truth, name).rank for name in originals)
    for field in truth.fields[-2:]:
        pairs = rows.select(field.name, field.duplicate_of).unique()
        assert len(pairs) == pairs[field.name].n_unique() == pairs[field.duplicate_of].n_unique() > 10
        assert not set(pairs[field.name]) & set(pairs[field.duplicate_of])
        assert field.cardinality == named(truth, field.duplicate_of).cardinality
        assert (field.rank, field.share, field.spectrum) == (0, 0, [])


def test_best_scores_agree_with_scikit_learn(truth, rows):
    for split in SPLITS:
        mine = rows.filter(pl.col("split") == split)
        best = truth.best[split]
        assert (best["rows"], best["positives"]) == (len(mine), mine["label"].sum())
        assert best["auc"] == pytest.approx(roc_auc_score(mine["label"], mine["probability"]), abs=1e-5)
        assert best["logloss"] == pytest.approx(log_loss(mine["label"], mine["probability"]), abs=1e-6)
    alike = SyntheticRows(truth, 3, (0.5, 0.25, 0.25))
    assert {best["auc"] for best in measure_truth(alike).values()} <= {None, 0.0, 1.0}


def test_same_seed_same_rows_in_any_pass_other_seed_others(tmp_path, truth, rows):
    source = SyntheticRows(truth, 270_000)  # two blocks
    chunks = list(source.chunks(["f07", "label", "f10", "split"]))
    assert [(chunk.first_row, chunk.frame.height) for chunk in chunks] == [
        (1, 1 << 18),
        ((1 << 18) + 1, 270_000 - (1 << 18)),
    ]
    more = pl.concat([chunk.frame for chunk in chunks])
    assert more.columns == ["f07", "label", "f10", "split"]
    assert more["split"].value_counts().sort("count")["count"].to_list() == [27_000, 27_000, 216_000]
    assert more[: len(rows)].drop("split").equals(rows.select("f07", "label", "f10"))
    assert pl.concat([chunk.frame for chunk in source.chunks(["f10"])])["f10"].equals(more["f10"])
    second = more["f07"][1 << 18 :]
    assert (more["f07"][: len(second)] == second).mean() < 0.5  # blocks do not repeat

    again = prepare_synthetic(tmp_path / "again", **OPTIONS, positive_rate=0.3, min_count=1, seed=5)
    assert Truth.load(tmp_path / "again").best == truth.best
    other = prepare_synthetic(tmp_path / "other", **OPTIONS, positive_rate=0.3, min_count=1, seed=6)
    assert Truth.load(tmp_path / "other").best != truth.best
    assert [s.positives for s in again.splits.values()] != [s.positives for s in other.splits.values()]


def test_rare_values_that_no_table_keeps_have_the_same_effect():
    truth = plant([300_000, 300_000], [7, 7], 0, zipf=0.5, signal=1.5, positive_rate=0.2, seed=3)
    (chunk,) = SyntheticRows(truth, 5000).chunks(["f01", "f02", "probability"])
    assert chunk.frame["f01"].n_unique() > 4000
    expected = 1 / (1 + np.exp(-truth.logits(chunk.frame)))
    assert chunk.frame["probability"].to_numpy() == pytest.approx(expected, rel=1e-4)


def test_memory_depends_neither_on_rows_nor_on_values():
    peaks = []
    for values, blocks in ((10**5, 1), (10**9, 3)):
        tracemalloc.start()
        truth = plant([values] * 4, [4, 4, 0, 2], 1, zipf=1.05, signal=1.5, positive_rate=0.2, seed=3)
        source = SyntheticRows(truth, blocks << 18)
        assert sum(chunk.frame.height for chunk in source.chunks(source.columns)) == source.rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 2**20 and peaks[1] < 200 * 2**20


def test_a_set_made_anew_has_its_own_truth(tmp_path):
    small = {"rows": 300, "fields": 3, "cardinality": [5, 9, 4], "ranks": "1", "duplicates": 0}
    for seed in (1, 2):
        prepare_synthetic(tmp_path / "out", **small, seed=seed, overwrite=seed == 2)
    assert Truth.load(tmp_path / "out").seed == Schema.load(tmp_path / "out").source["seed"] == 2
    (tmp_path / "out" / "truth.json").write_text('{"version": 2}')
    with pytest.raises(UserError, match="truth.json: is not of version 1; prepare the data set again"):
        Truth.load(tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        Truth.load(tmp_path)


def test_a_value_of_another_field_is_refused(truth):
    with pytest.raises(ValueError, match="field 'f01' has no value"):
        truth.popularity("f01", [12345])
    places = np.arange(named(truth, "f08").cardinality)
    assert (truth.popularity("f08", truth.values("f08", places)) == places).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows 0: must be at least 1"),
        ({"fields": 0}, "fields 0: must be at least 1"),
        ({"duplicates": -1}, "duplicates -1: must be at least 0 and at most 9"),
        ({"duplicates": 10}, "duplicates 10: must be at least 0 and at most 9"),
        ({"duplicates": 5, "ranks": [0, 0, 0, 2, 2]}, "duplicates 5: only 2 fields have an effect"),
        ({"cardinality": "9"}, "cardinality: 1 numbers for 8 fields"),
        ({"cardinality": "100:10"}, "cardinality 100:10: give LOW:HIGH, as in 10:1000000"),
        ({"cardinality": "1:2:3"}, "cardinality 1:2:3: give LOW:HIGH"),
        ({"cardinality": "ten:20"}, "cardinality 'ten,20': give whole numbers"),
        ({"cardinality": "0:20"}, "cardinality 0: must be at least 1 and at most 4294967296"),
        ({"cardinality": "10:5000000000"}, "cardinality 5000000000: must be at least 1 and at most 4294967296"),
        ({"zipf": -0.1}, "zipf -0.1: must be at least 0 and at most 4"),
        ({"zipf": float("nan")}, "zipf nan: must be"),
        ({"ranks": "1,-1"}, "ranks -1: must be at least 0 and at most 1024"),
        ({"ranks": "1,,2"}, "ranks '1,,2': give whole numbers, as in 1,2,4"),
        ({"ranks": []}, "ranks: is empty"),
        ({"ranks": "0"}, "ranks: all are 0; at least one field must have an effect"),
        ({"ranks": "12"}, "ranks: f01 has 12 values, too few for rank 12; raise cardinality"),
        (
            {"ranks": [0, 1, 4, 0, 0, 0, 0, 1]},
            "ranks: f03 cannot show rank 4 where the other fields' ranks add up to 2",
        ),
        ({"signal": 0}, "signal 0: must be above 0"),
        ({"positive_rate": 1}, "positive-rate 1: must be between 0 and 1"),
        ({"split": (0.5, 0.4, 0.2)}, "split 0.5,0.4,0.2: sums to 1.1"),
        ({"min_count": 0}, "min-count 0: must be at least 1"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as refused:
        prepare_synthetic(tmp_path / "out", **OPTIONS | changes)
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == []
