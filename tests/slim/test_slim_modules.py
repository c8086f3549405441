"""Every embedding module before sharding, slimmed: against the same module with its dropped columns set to zero."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection, ITEPEmbeddingCollection
from torchrec.modules.itep_modules import GenericITEPModule

import sseds_rec as sr
from tests.search.zoo import KEYS, TABLES, Case, make_batch, plain_model
from tests.slim.moves import mask, plan_keeping
from tests.slim.shared import CUTS, Wrapped, assert_equal, assert_raw, make_features, pooled, sequences

#: Of a width that is stored wider, of all columns, of a table of two features, and of none.
KEPT: dict[str, list[int]] = {"t0": [0, 3, 6], "t1": list(range(8)), "t2": [1, 2, 5, 7], "t3": []}
NONE: dict[str, list[int]] = {name: [] for name in KEPT}
CASES = [
    Case(),
    Case(pooling="MEAN"),
    Case(weighted=True),
    Case(repeats=True),
    Case(twice=True),
    Case("ec"),
    Case("fp"),
    Case("mc"),
    Case("mcec"),
]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def _tables_of(name: str) -> list[str]:
    return [part for part in name.split(".") if part in TABLES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_module_equals_the_masked_one(case: Case) -> None:
    model = plain_model(case).eval()
    before = _state(model)
    slim = sr.slim(model, plan_keeping(model, KEPT))
    masked = copy.deepcopy(model)
    mask(masked, KEPT)
    batch = make_batch(case)
    expected = masked(batch)[1]
    torch.testing.assert_close(slim(batch)[1], expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, model(batch)[1], atol=1e-4)
    slim(batch)[0].backward()
    _assert_same(_state(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    names = [name for name in slim.state_dict() if ".transforms." not in name]
    assert sorted(names) == sorted(name for name in before if "t3" not in _tables_of(name) and ".f4." not in name)
    again = sr.slim(model, plan_keeping(model, KEPT), init="random")
    again.load_state_dict(slim.state_dict())
    _assert_same(_state(again), _state(slim))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_modules_of_which_nothing_is_left_give_zeros(case: Case) -> None:
    model = plain_model(case).eval()
    slim = sr.slim(model, plan_keeping(model, NONE))
    masked = copy.deepcopy(model)
    mask(masked, NONE)
    torch.testing.assert_close(slim(make_batch(case))[1], masked(make_batch(case))[1], rtol=0, atol=1e-6)
    assert not [name for name in slim.state_dict() if _tables_of(name)]


@pytest.mark.parametrize("training", [True, False])
def test_slim_modules_are_in_the_mode_of_the_original(training: bool) -> None:
    for case in CASES:
        model = plain_model(case).train(training)
        slim = sr.slim(model, plan_keeping(model, KEPT))
        assert {module.training for module in slim.modules()} == {training}


@pytest.mark.parametrize("kept", CUTS)
def test_features_of_several_tables_keep_their_keys(kept: dict[str, list[int]]) -> None:
    for model in (pooled(), sequences(), sequences(need_indices=True)):
        slim, masked = sr.slim(model, plan_keeping(model, kept)), copy.deepcopy(model)
        mask(masked, kept)
        ids = getattr(model.embedding, "_need_indices", False)
        assert_equal(slim(make_features()), masked(make_features()), ids)
        raw = sr.slim(model, plan_keeping(model, kept), raw=True)(make_features())
        assert_raw(raw, model(make_features()), kept, ids)


@pytest.mark.parametrize("kept", CUTS)
def test_tensor_dicts_are_taken_where_torchrec_takes_them(kept: dict[str, list[int]]) -> None:
    features = TensorDict(
        {
            key: torch.nested.nested_tensor_from_jagged(jagged.values(), jagged.offsets().long())
            for key, jagged in make_features().to_dict().items()
        }
    )
    for model in (pooled(), sequences()):
        slim, masked = sr.slim(model, plan_keeping(model, kept)), copy.deepcopy(model)
        mask(masked, kept)
        assert_equal(slim(features), masked(features))


@pytest.mark.parametrize("dtype", [DataType.FP16, DataType.BF16])
def test_tables_of_half_precision(dtype: DataType) -> None:
    for model in (pooled(data_type=dtype), sequences(data_type=dtype)):
        kept = CUTS[0]
        slim, masked = sr.slim(model, plan_keeping(model, kept)), copy.deepcopy(model)
        mask(masked, kept)
        assert_equal(slim(make_features()), masked(make_features()))
        stored = {p.dtype for name, p in slim.named_parameters() if name.endswith(".weight")}
        assert stored == {p.dtype for p in model.parameters()} != {torch.float32}


@pytest.mark.parametrize("kept", CUTS)
def test_modules_that_prune_rows_keep_their_count_and_settings(kept: dict[str, list[int]]) -> None:
    sizes = {"first": 30, "third": 20}
    for inner, kind in ((pooled(), ITEPEmbeddingBagCollection), (sequences(), ITEPEmbeddingCollection)):
        model = Wrapped(kind(inner.embedding, GenericITEPModule(sizes, pruning_interval=7)))  # type: ignore[arg-type]
        for _ in range(3):
            model(make_features())
        plan = plan_keeping(inner, kept)
        slim = sr.slim(model, plan)
        mask(inner, kept)
        assert_equal(slim(make_features()), inner(make_features()))
        parts = [own for own in slim.modules() if isinstance(own, kind)]
        assert {int(own._iter) for own in parts} == {4} and int(model.embedding._iter) == 3
        assert {own._itep_module.pruning_interval for own in parts} == {7}
        assert all(own._itep_module.table_name_to_unpruned_hash_sizes == sizes for own in parts)
        state = slim.state_dict()
        assert {name for name in state if ".transforms." not in name} == {
            name for name in model.state_dict() if all(kept[table] for table in _named(name, list(kept)))
        }
        again = sr.slim(model, plan, init="random")
        again.load_state_dict(state)
        _assert_same(_state(again), state)


def _named(name: str, tables: list[str]) -> list[str]:
    return [part for part in name.split(".") if part in tables]


def test_position_weights_of_a_collection_of_processors() -> None:
    inner = pooled(is_weighted=True)
    processors = PositionWeightedModuleCollection({"a": 4, "b": 4, "c": 4})
    for own in processors.parameters():
        own.data.uniform_(0.5, 1.5)
    model = Wrapped(FeatureProcessedEmbeddingBagCollection(inner.embedding, processors))
    for kept in CUTS:
        slim, masked = sr.slim(model, plan_keeping(model, kept)), copy.deepcopy(model)
        mask(masked, kept)
        assert_equal(slim(make_features()), masked(make_features()))


@pytest.mark.parametrize("kind", ["mc", "mcec"])
def test_remapped_ids_of_the_kept_tables_are_returned(kind: str) -> None:
    model = plain_model(Case(kind)).eval()
    model.embedding._return_remapped_features = True
    slim = sr.slim(model, plan_keeping(model, KEPT))
    features, _ = make_batch(Case(kind))
    original, found = model.embedding(features)[1], slim.embedding(features)[1]
    kept = [feature for feature, table in KEYS.items() if KEPT[table]]
    assert sorted(found.keys()) == kept
    for feature in kept:
        assert torch.equal(found[feature].values(), original[feature].values())
        assert torch.equal(found[feature].lengths(), original[feature].lengths())
