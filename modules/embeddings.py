"""Embedding tables behind one interface and two engines: ids in, vectors out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlenv.batch import SparseFeatures
from mlenv.config import EmbeddingsConfig
from mlenv.errors import ConfigError, require
from mlenv.modules.ids_ahead import IdsAhead
from mlenv.schema import Schema, SparseKey

if TYPE_CHECKING:
    from torchrec import KeyedTensor

_BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class EmbeddedSequence:
    """Vectors of past events, jagged: the events of example 0, then of example 1, ..."""

    values: Tensor
    """``(events, dim)``: the fields of an event side by side, in the order of ``schema.sparse_keys``."""
    lengths: Tensor
    """``(batch,)`` int32, events per example."""


@dataclass(frozen=True)
class EmbeddedFeatures:
    """Vectors of one batch."""

    pooled: Tensor
    """``(batch, pooled_dim)``: one vector per key that is not in a sequence, side by side in the order of ``pooled_keys``."""
    sequences: dict[str, EmbeddedSequence]
    """By feature."""


class EmbeddingLayout:
    """Which keys are looked up how, and how wide the result is; the same for both engines."""

    def __init__(self, schema: Schema) -> None:
        for name in (name for name in schema.tables if hasattr(nn.ModuleDict(), name)):
            raise ConfigError(f"schema.tables.{name}", expected="a name that PyTorch's modules do not use themselves", received=name)
        self.tables = schema.tables
        self.keys = schema.sparse_keys
        self.pooled_keys = tuple(key for key in self.keys if key.group != "sequence")
        self.pooled_dims = tuple(schema.tables[key.table].embedding_dim for key in self.pooled_keys)
        self.sequence_dims: dict[str, int] = {}
        """Width of an event, by feature."""
        for key in (key for key in self.keys if key.group == "sequence"):
            self.sequence_dims[key.feature] = self.sequence_dims.get(key.feature, 0) + schema.tables[key.table].embedding_dim

    def lookups(self) -> Iterator[tuple[str, slice, tuple[SparseKey, ...]]]:
        """Each lookup that occurs under a name of its own, where its keys lie, and the keys; they share how they are looked up."""
        start = 0
        for name, group in groupby(self.keys, key=self._lookup_name):
            keys = tuple(group)
            yield name, slice(start, start + len(keys)), keys
            start += len(keys)

    def _lookup_name(self, key: SparseKey) -> str:
        return f"unpooled_{self.tables[key.table].embedding_dim}" if key.lookup == "unpooled" else key.lookup


class TorchEmbeddings(nn.Module):
    """Plain tables, looked up with PyTorch's own operators: runs and exports everywhere. Gradients are sparse, or dense for Adam."""

    def __init__(self, schema: Schema, config: EmbeddingsConfig, seed: int) -> None:
        super().__init__()
        self.layout = EmbeddingLayout(schema)
        self.tables = nn.ModuleDict()
        for name, table in schema.tables.items():
            weight = torch.empty(table.num_embeddings, table.embedding_dim)
            fill_initial_rows(weight, 0, name, config.init_std, seed)
            is_sparse = config.of(name).optimizer != "adam"
            self.tables[name] = nn.Embedding(table.num_embeddings, table.embedding_dim, sparse=is_sparse, _weight=weight)

    def forward(self, sparse: SparseFeatures) -> EmbeddedFeatures:
        """
        Args:
            sparse: the keys of the schema, in its order.

        Returns:
            float32 vectors; an empty bag is zeros.
        """
        offsets = [0, *accumulate(sparse.value_counts)]
        lengths = sparse.lengths.view(len(sparse.keys), sparse.batch_size)
        pooled: list[Tensor] = []
        events: dict[str, list[EmbeddedSequence]] = {}
        for place, key in enumerate(self.layout.keys):
            ids = sparse.values[offsets[place] : offsets[place + 1]]
            table = self.tables[key.table]
            assert isinstance(table, nn.Embedding)
            weight = table.weight
            if key.group == "sequence":
                values = functional.embedding(ids, weight, sparse=table.sparse)
                events.setdefault(key.feature, []).append(EmbeddedSequence(values, lengths[place]))
            elif key.group == "single" and len(ids) == sparse.batch_size:
                pooled.append(functional.embedding(ids, weight, sparse=table.sparse))
            else:
                weights = (
                    sparse.weights[offsets[place] : offsets[place + 1]]
                    if sparse.weights is not None and key.group == "weighted_bag"
                    else None
                )
                pooling = self.layout.tables[key.table].pooling
                pooled.append(_embedding_bag(ids, table, lengths[place], weights, pooling))
        return EmbeddedFeatures(side_by_side(pooled, lengths), joined_fields(events))


class TorchRecEmbeddings(nn.Module):
    """Tables in TorchRec's collections, to be sharded and given a fused optimizer by ``mlenv.loops.sharding``.

    Source: Ivchenko et al., "TorchRec: a PyTorch Domain Library for Recommendation Systems", RecSys 2022.
    """

    def __init__(self, schema: Schema, config: EmbeddingsConfig, seed: int) -> None:
        super().__init__()
        torchrec = require("torchrec", extra="torchrec")
        self.layout = EmbeddingLayout(schema)
        self.ids_ahead = IdsAhead()
        self.collections = nn.ModuleDict()
        for name, _, keys in self.layout.lookups():
            users: dict[str, list[str]] = {}
            for key in keys:
                users.setdefault(key.table, []).append(key.name)
            rows = {table: schema.tables[table].num_embeddings for table in users}
            dims = {table: schema.tables[table].embedding_dim for table in users}
            table_config = torchrec.EmbeddingConfig if keys[0].lookup == "unpooled" else torchrec.EmbeddingBagConfig
            tables = [
                table_config(name=table, feature_names=features, num_embeddings=rows[table], embedding_dim=dims[table])
                for table, features in users.items()
            ]
            meta = torch.device("meta")
            if keys[0].lookup == "unpooled":
                self.collections[name] = torchrec.EmbeddingCollection(tables=tables, device=meta)
            else:
                is_weighted = keys[0].lookup == "pooled_weighted"
                self.collections[name] = torchrec.EmbeddingBagCollection(tables=tables, is_weighted=is_weighted, device=meta)

    def forward(self, sparse: SparseFeatures) -> EmbeddedFeatures:
        """
        Args:
            sparse: the keys of the schema, in its order.

        Returns:
            float32 vectors; an empty bag is zeros.
        """
        if sparse.batch_size == 0:  # of which TorchRec cannot look up sequences: one example without ids, and nothing of it
            one = self(replace(sparse, lengths=sparse.lengths.new_zeros(len(sparse.keys))))
            none = {feature: EmbeddedSequence(events.values, events.lengths[:0]) for feature, events in one.sequences.items()}
            return EmbeddedFeatures(one.pooled[:0], none)
        lengths = sparse.lengths.view(len(sparse.keys), sparse.batch_size)
        pooled: list[Tensor] = []
        events: dict[str, list[EmbeddedSequence]] = {}
        for name, where, keys in self.layout.lookups():
            found = self.ids_ahead.look_up(self.collections[name], name, sparse)
            if found is None:
                found = self.collections[name](sparse.select(where.start, where.stop).to_keyed_jagged_tensor())
            if keys[0].lookup != "unpooled":
                pooled += self._pooled(found, keys, lengths[where])
                continue
            for place, key in enumerate(keys, start=where.start):
                vectors = found[key.name].values()
                if key.group == "sequence":
                    events.setdefault(key.feature, []).append(EmbeddedSequence(vectors, lengths[place]))
                elif key.group == "single" and len(vectors) == sparse.batch_size:
                    pooled.append(vectors)
                else:
                    weights = found[key.name].weights_or_none() if key.group == "weighted_bag" else None
                    pooled.append(pool(vectors, lengths[place], weights, self.layout.tables[key.table].pooling))
        return EmbeddedFeatures(side_by_side(pooled, lengths), joined_fields(events))

    def send_ahead(self, sparse: SparseFeatures) -> None:
        """Starts to send the ids of a later batch to the ranks that hold their rows, once the tables are divided over them.

        All ranks do so at the same point. ``forward`` over this very object goes on from there.
        """
        for name, where, _ in self.layout.lookups():
            self.ids_ahead.send(self.collections[name], name, sparse, sparse.select(where.start, where.stop).to_keyed_jagged_tensor())

    def _pooled(self, found: KeyedTensor, keys: tuple[SparseKey, ...], lengths: Tensor) -> list[Tensor]:
        """Pooled vectors in the order of the keys. Means are divided here: fbgemm's fused update of its own means on a CPU forgets to."""
        poolings = [self.layout.tables[key.table].pooling for key in keys]
        if "mean" not in poolings and list(found.keys()) == [key.name for key in keys]:
            return [found.values()]
        return [_divide(found[key.name], bag_lengths, pooling) for key, bag_lengths, pooling in zip(keys, lengths, poolings, strict=True)]


Embeddings = TorchEmbeddings | TorchRecEmbeddings

ENGINES = {"torch": TorchEmbeddings, "torchrec": TorchRecEmbeddings}


def fill_initial_rows(rows: Tensor, first_row: int, table: str, std: float, seed: int) -> None:
    """Fills rows ``first_row`` and following of a table with their initial values.

    A row's values depend on the seed, the table's name and the row alone, so that every engine and every sharding
    starts from the same table.
    """
    digest = hashlib.sha256(f"{seed} {table}".encode()).digest()
    last_row = first_row + rows.shape[0]
    for block in range(first_row // _BLOCK_ROWS, -(-last_row // _BLOCK_ROWS)):
        generator = torch.Generator().manual_seed((int.from_bytes(digest[:7], "little") + block) % 2**63)
        values = torch.randn(_BLOCK_ROWS, rows.shape[1], generator=generator) * std
        start, stop = max(first_row, block * _BLOCK_ROWS), min(last_row, (block + 1) * _BLOCK_ROWS)
        with torch.no_grad():
            rows[start - first_row : stop - first_row] = values[start - block * _BLOCK_ROWS : stop - block * _BLOCK_ROWS].to(rows.device)


def rows_of_bags(lengths: Tensor, total: int) -> Tensor:
    """The example of every id: ``[2, 0, 1]`` gives ``[0, 0, 2]``. ``total`` is the sum of the lengths, known on the host."""
    examples = torch.arange(lengths.shape[0], device=lengths.device)  # len() would fix the batch size of an export
    return torch.repeat_interleave(examples, lengths, output_size=total)


def pool(vectors: Tensor, lengths: Tensor, weights: Tensor | None, pooling: str) -> Tensor:
    """Sums ``(ids, dim)`` vectors per bag to ``(batch, dim)``; mean divides by the number of ids."""
    if weights is not None:
        vectors = vectors * weights.unsqueeze(1)
    pooled = vectors.new_zeros(lengths.shape[0], vectors.shape[1]).index_add(0, rows_of_bags(lengths, vectors.shape[0]), vectors)
    return _divide(pooled, lengths, pooling)


def _embedding_bag(ids: Tensor, table: nn.Embedding, lengths: Tensor, weights: Tensor | None, pooling: str) -> Tensor:
    offsets = torch.cumsum(lengths, 0) - lengths
    pooled = functional.embedding_bag(ids, table.weight, offsets, mode="sum", sparse=table.sparse, per_sample_weights=weights)
    return _divide(pooled, lengths, pooling)


def _divide(sums: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """Sums per bag as they are, or as means; an empty bag stays zeros."""
    return sums / lengths.clamp(min=1).unsqueeze(1) if pooling == "mean" else sums


def side_by_side(vectors: list[Tensor], lengths: Tensor) -> Tensor:
    if not vectors:
        return torch.zeros(lengths.shape[1], 0, device=lengths.device)
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)


def joined_fields(events: dict[str, list[EmbeddedSequence]]) -> dict[str, EmbeddedSequence]:
    """Fields of one sequence side by side; their lengths agree, which the encoding checked."""
    return {
        feature: EmbeddedSequence(side_by_side([field.values for field in fields], fields[0].lengths), fields[0].lengths)
        for feature, fields in events.items()
    }
