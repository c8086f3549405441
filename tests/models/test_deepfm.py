"""DeepFM against plain PyTorch written from the paper's sums, uniform and slim."""

from __future__ import annotations

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedTensor

from sseds_rec.models.deepfm import DeepFM
from sseds_rec.models.fields import FieldEmbeddings
from sseds_rec.models.registry import ModelConfig
from tests.models.plain import plain_deepfm

B = 7


@pytest.mark.parametrize("num_dense", [0, 3])
@pytest.mark.parametrize(
    ("dims", "aligned_dim"), [({"a": 8, "b": 8, "c": 8}, None), ({"a": 4, "b": 12, "c": 4}, 12), ({"a": 3, "b": 5}, 16)]
)
def test_logits_and_gradients_equal_plain_pytorch(
    dims: dict[str, int], aligned_dim: int | None, num_dense: int
) -> None:
    torch.manual_seed(0)
    model = DeepFM(FieldEmbeddings(dims, aligned_dim), num_dense, ModelConfig(hidden=[10, 6]))
    dense = torch.randn(B, num_dense)
    fields = {name: torch.randn(B, dim, requires_grad=True) for name, dim in dims.items()}
    shuffled = list(fields)[::-1]  # as a sharded collection may order its keys
    keyed = KeyedTensor.from_tensor_list(shuffled, [fields[name] for name in shuffled])
    ours, plain = model(dense, keyed), plain_deepfm(model, dense, fields)
    assert ours.shape == (B,)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    inputs = [*fields.values(), *model.parameters()]
    weights = torch.randn(B)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((plain * weights).sum(), inputs),
        rtol=1e-5,
        atol=1e-5,
    )


def test_padding_columns_of_a_stored_table_are_not_seen() -> None:
    torch.manual_seed(0)
    model = DeepFM(FieldEmbeddings({"a": 3, "b": 5}, 8), 0, ModelConfig(hidden=[4]))
    a, b = torch.randn(B, 4), torch.randn(B, 8)
    stored = model(torch.empty(B, 0), KeyedTensor.from_tensor_list(["a", "b"], [a, b]))
    a[:, 3:], b[:, 5:] = 100.0, 100.0
    assert torch.equal(stored, model(torch.empty(B, 0), KeyedTensor.from_tensor_list(["a", "b"], [a, b])))


def test_dropout_and_batch_norm_are_in_the_deep_part_when_asked() -> None:
    fields = FieldEmbeddings({"a": 4})
    plain = DeepFM(fields, 0, ModelConfig(hidden=[8, 8]))
    rich = DeepFM(fields, 0, ModelConfig(hidden=[8, 8], dropout=0.5, batch_norm=True))
    kinds = [type(layer).__name__ for layer in rich.deep]
    assert [type(layer).__name__ for layer in plain.deep] == ["Linear", "ReLU"] * 2
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2
