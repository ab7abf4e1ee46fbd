"""Batches from which features are taken away, as if their columns had been null: what a model does without them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mlenv.batch import Batch, SparseFeatures
from mlenv.datasets.encoding import encode_missing
from mlenv.inference.batch_rows import side_by_side
from mlenv.schema import Schema


def feature_groups(schema: Schema) -> dict[str, frozenset[str]]:
    """What may go missing together, in words and by name: all features of an entity, and each core feature."""
    groups: dict[str, frozenset[str]] = {}
    for entity in dict.fromkeys(feature.entity for feature in schema.features.values()):
        groups[f"{entity} features"] = frozenset(name for name, feature in schema.features.items() if feature.entity == entity)
    return groups | {f"core feature {name}": frozenset({name}) for name, feature in schema.features.items() if feature.core}


class MissingFeatures:
    """Takes features away from rows of a batch; in their place is what the schema makes of null."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._ids, self._dense = encode_missing(schema)

    def of(self, batch: Batch, features: Collection[str], rows: Tensor) -> Batch:
        """
        Args:
            batch: encoded for the schema.
            rows: ``(batch,)`` bool, which ones lose them.
        """
        keep = torch.ones(self._schema.num_dense, dtype=torch.bool)
        for column in self._schema.dense_columns:
            keep[column.start : column.start + column.width] = column.name not in features
        dense = torch.where(keep | ~rows[:, None], batch.dense, torch.from_numpy(self._dense))
        return replace(batch, sparse=self._sparse(batch.sparse, features, rows), dense=dense)

    def _sparse(self, sparse: SparseFeatures, features: Collection[str], rows: Tensor) -> SparseFeatures:
        parts = [sparse.select(place, place + 1) for place in range(len(sparse.keys))]
        return side_by_side(
            [
                _without(part, rows, self._ids) if key.feature in features else part
                for key, part in zip(self._schema.sparse_keys, parts, strict=True)
            ]
        )


def _without(part: SparseFeatures, rows: Tensor, ids_of_null: Mapping[str, int]) -> SparseFeatures:
    """Bags of one key, those of some rows emptied; where null has an id, every bag has one, and theirs becomes that."""
    gone = torch.repeat_interleave(rows, part.lengths.long())
    if (null := ids_of_null.get(part.keys[0])) is not None:
        return replace(part, values=torch.where(gone, null, part.values))
    weights = None if part.weights is None else part.weights[~gone]
    values = part.values[~gone]
    return SparseFeatures(part.keys, values, torch.where(rows, 0, part.lengths), (len(values),), weights)
