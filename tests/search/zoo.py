"""Models around every embedding module that can be searched, and the same in float64 with an explicit α for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    KeyedTensor,
)
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import LFU_EvictionPolicy, ManagedCollisionCollection, MCHManagedCollisionModule

from sseds_rec.search.losses import RecordedLosses, record_losses
from sseds_rec.search.tap import tapped

#: Table -> (rows, features): t2 serves two features.
TABLES = {"t0": (52, ["f0"]), "t1": (72, ["f1"]), "t2": (32, ["f2", "f3"]), "t3": (20, ["f4"])}
#: Feature, and key of its output -> table.
KEYS = {feature: table for table, (_, features) in TABLES.items() for feature in features}
FEATURES = list(KEYS)
DIM = 8
ROWS = 40
#: Ids stay in the smallest table's range.
IDS = 20
#: Managed collision splits raw ids of this range over the ranks.
RAW = 1 << 20


@dataclass(frozen=True)
class Case:
    """A module and what it is fed.

    Attributes:
        kind: "ebc"; "ec", a sequence; "fp", an ebc that weighs ids by their position; "mc" and "mcec", an ebc and an ec
            that map raw ids to rows.
        pooling: of an ebc.
        weighted: an ebc whose ids have weights.
        repeats: rows with the same ids are looked up once ("variable batch size per feature").
        twice: the ebc is called twice.
    """

    kind: str = "ebc"
    pooling: str = "SUM"
    weighted: bool = False
    repeats: bool = False
    twice: bool = False

    def __str__(self) -> str:
        names = [self.kind, *([self.pooling] if self.pooling != "SUM" else [])]
        return "-".join(names + [name for name in ("weighted", "repeats", "twice") if getattr(self, name)])


class Click(nn.Module):
    """(KJT, labels) -> (loss, logits) over one embedding module; everything after it is float64."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.over = nn.Sequential(nn.Linear(DIM * len(KEYS), 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1)).double()

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        features, labels = batch
        found = self.look_up(features)
        columns = [_column(found, key) for key in KEYS]
        logits = self.over(torch.cat(columns, dim=1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, labels), logits.detach()

    def look_up(self, features: KeyedJaggedTensor) -> Any:
        found = self.embedding(features)
        found = found[0] if isinstance(found, tuple) else found
        return found.wait() if isinstance(self.embedding, ShardedModule) else found


class Twice(Click):
    """Multiplies what two calls of the same module give."""

    def look_up(self, features: KeyedJaggedTensor) -> Any:
        first, second = super().look_up(features), super().look_up(features)
        return KeyedTensor(first.keys(), first.length_per_key(), first.values() * second.values())


def _column(found: Any, key: str) -> Tensor:
    if isinstance(found, KeyedTensor):
        return found[key].double()
    rows = [torch.tanh(values.double()).sum(dim=0) for values in found[key].to_dense()]
    return torch.stack(rows)


def build(case: Case, device: str = "cpu") -> Click:
    """The model around the module."""
    where = torch.device(device)
    common = [
        {"name": name, "num_embeddings": rows, "embedding_dim": DIM, "feature_names": list(features)}
        for name, (rows, features) in TABLES.items()
    ]
    bags = [EmbeddingBagConfig(**c, pooling=PoolingType[case.pooling]) for c in common]
    sequences = [EmbeddingConfig(**c) for c in common]
    if case.kind in ("ec", "mcec"):
        sequence = EmbeddingCollection(tables=sequences, device=where)
        if case.kind == "ec":
            return Click(sequence)
        return Click(ManagedCollisionEmbeddingCollection(sequence, _maps(sequences, where)))
    pooled = EmbeddingBagCollection(tables=bags, is_weighted=case.weighted or case.kind == "fp", device=where)
    if case.kind == "mc":
        return Click(ManagedCollisionEmbeddingBagCollection(pooled, _maps(bags, where), return_remapped_features=True))
    if case.kind == "fp":
        positions = {feature: PositionWeightedModule(max_feature_length=4, device=where) for feature in FEATURES}
        return Click(FeatureProcessedEmbeddingBagCollection(pooled, positions))
    return Twice(pooled) if case.twice else Click(pooled)


def _maps(configs: Any, device: torch.device) -> ManagedCollisionCollection:
    maps = {
        config.name: MCHManagedCollisionModule(
            zch_size=config.num_embeddings,
            device=device,
            eviction_policy=LFU_EvictionPolicy(),
            eviction_interval=10,
            input_hash_size=RAW,
            buckets=dist.get_world_size() if dist.is_initialized() else 1,
        )
        for config in configs
    }
    return ManagedCollisionCollection(maps, configs)


def raw_id(table: str, row: int | Tensor) -> Any:
    """An id of the range that belongs to the rank which holds the row."""
    step = RAW // TABLES[table][0]
    return row * step + step // 2


def fill_maps(model: nn.Module) -> None:
    """Gives every raw id its row. The last row of each rank is that of all ids which have none: of its own `raw_id` too."""
    for path, module in model.named_modules():
        if isinstance(module, MCHManagedCollisionModule):
            rows = torch.arange(module._zch_size - 1) + module._output_global_offset
            module._mch_sorted_raw_ids[:-1] = raw_id(path.rpartition(".")[2], rows)


def weights_of(case: Case) -> dict[str, Tensor]:
    """The parameters of an unsharded model, the same in every process."""
    torch.manual_seed(11)
    model = build(case)
    for name, value in model.named_parameters():
        if "position_weight" in name:
            value.data.uniform_(0.5, 1.5)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def plain_model(case: Case) -> Click:
    """An unsharded model with these parameters."""
    model = build(case)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(weights_of(case)[name])
    fill_maps(model)
    return model


def make_rows(case: Case) -> tuple[list[list[list[int]]], list[list[list[float]]], Tensor]:
    """Ids and weights [row][feature], none to three each, and labels."""
    generator = torch.Generator().manual_seed(1)
    ids: list[list[list[int]]] = []
    weights: list[list[list[float]]] = []
    for _ in range(ROWS):
        lengths = torch.randint(0, 4, (len(FEATURES),), generator=generator).tolist()
        ids.append([torch.randint(0, IDS, (n,), generator=generator).tolist() for n in lengths])
        weights.append([torch.rand(n, generator=generator).tolist() if case.weighted else [1.0] * n for n in lengths])
    return ids, weights, (torch.rand(ROWS, generator=generator) > 0.5).double()


def make_batch(case: Case, first: int = 0, last: int = ROWS) -> tuple[KeyedJaggedTensor, Tensor]:
    """Rows [first, last) as the model takes them."""
    ids, weights, labels = make_rows(case)
    lengths, values, scales, strides, inverse = [], [], [], [], []
    for f, table in enumerate(KEYS.values()):
        bags = [(tuple(ids[row][f]), tuple(weights[row][f])) for row in range(first, last)]
        unique = list(dict.fromkeys(bags)) if case.repeats else bags
        lengths += [len(own) for own, _ in unique]
        values += [raw_id(table, i) if case.kind in ("mc", "mcec") else i for own, _ in unique for i in own]
        scales += [scale for _, own in unique for scale in own]
        strides.append([len(unique)])
        inverse.append([unique.index(bag) for bag in bags])
    features = KeyedJaggedTensor(
        keys=FEATURES,
        values=torch.tensor(values, dtype=torch.int64),
        weights=torch.tensor(scales) if case.weighted else None,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        stride_per_key_per_rank=strides if case.repeats else None,
        inverse_indices=(FEATURES, torch.tensor(inverse)) if case.repeats else None,
    )
    return features, labels[first:last]


Found = dict[str, dict[str, Tensor]]


def explicit(case: Case, first: int = 0, last: int = ROWS, added: float = 0) -> Found:
    """Of each table, in float64 and with an α for every row: ∂(rows x loss)/∂α_b [B, D], ∂z_b/∂α_b, Σ e and Σ mass; and z [B].

    Args:
        added: to the number of ids by which a mean is divided.
    """
    ids, id_weights, labels = make_rows(case)
    weights = {name: value.double() for name, value in weights_of(case).items()}
    tables = {t: next(v for n, v in weights.items() if n.endswith(f".{t}.weight")) for t in TABLES}
    alpha = {t: torch.ones(last - first, DIM, dtype=torch.float64, requires_grad=True) for t in TABLES}
    outputs = {t: torch.zeros(last - first, DIM, dtype=torch.float64) for t in TABLES}
    masses = {t: torch.zeros(last - first, dtype=torch.float64) for t in TABLES}
    columns = []
    for f, (feature, table) in enumerate(KEYS.items()):
        column = []
        for b in range(last - first):
            own = ids[first + b][f]
            scale = torch.tensor(id_weights[first + b][f]).double()
            if case.kind == "fp":
                scale = next(v for n, v in weights.items() if f".{feature}.position_weight" in n)[: len(own)]
            if case.pooling == "MEAN":
                scale = scale / (max(len(own), 1) + added)
            vectors = tables[table][own] * scale[:, None]
            outputs[table][b] += vectors.sum(dim=0) * (1 + case.twice)
            masses[table][b] += scale.sum() * (1 + case.twice)
            seen = vectors * alpha[table][b]
            seen = torch.tanh(seen).sum(dim=0) if case.kind in ("ec", "mcec") else seen.sum(dim=0)
            column.append(seen**2 if case.twice else seen)
        columns.append(torch.stack(column))
    hidden = torch.tanh(torch.cat(columns, dim=1) @ weights["over.0.weight"].T + weights["over.0.bias"])
    z = (hidden @ weights["over.3.weight"].T + weights["over.3.bias"]).squeeze(1)
    loss = F.binary_cross_entropy_with_logits(z, labels[first:last], reduction="sum")
    leaves = list(alpha.values())
    found = {
        "loss": torch.autograd.grad(loss, leaves, retain_graph=True),
        "logit": torch.autograd.grad(z.sum(), leaves),
        "output": list(outputs.values()),
        "mass": list(masses.values()),
    }
    return {of: dict(zip(alpha, values, strict=True)) for of, values in found.items()} | {"z": {"": z.detach()}}


def measure(model: nn.Module, batch: Any, mass: bool = False) -> Found:
    """What `explicit` gives, through the taps."""
    found: Found = {}
    with tapped(model) as taps:

        def forward() -> tuple[Tensor, RecordedLosses]:
            with torch.enable_grad(), record_losses() as recorded:
                return model(batch)[0], recorded

        loss, recorded = taps.run(forward)
        rows = taps.rows()
        (target,) = recorded.targets(rows, loss)
        for of, differentiated in (("loss", loss * rows), ("logit", target.logit)):
            gradients = torch.autograd.grad(differentiated, taps.leaves(), retain_graph=True, allow_unused=True)
            found[of] = {name: sample.contribution() for name, sample in taps.samples(gradients)}
        found["output"] = {name: sample.output() for name, sample in taps.samples(None)}
        if mass:
            masses = {name: [one.mass() for one in sample.lookups] for name, sample in taps.samples(None)}
            found["mass"] = {name: torch.stack(own).sum(dim=0) for name, own in masses.items()}
    return found


def assert_equal(found: Found, expected: Found) -> None:
    """To 1e-6 of each table's largest value."""
    for of, tables in found.items():
        assert list(tables) == list(TABLES)
        for name, values in tables.items():
            largest = float(expected[of][name].abs().max())
            error = float((values - expected[of][name]).abs().max()) / largest
            assert error < 1e-6, f"{of} of {name}: off by {error}"
