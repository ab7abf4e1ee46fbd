"""Rows of batches put together anew: several batches as one, and features that come from other rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import pyarrow as pa
import torch
from torch import Tensor

from mlenv.batch import Batch, SparseFeatures
from mlenv.schema import Schema


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Rows of several batches one after the other, as one batch with the position of the last."""
    first, *_ = batches
    places = range(len(first.sparse.keys))
    parts = [join_bags([batch.sparse.select(place, place + 1) for batch in batches]) for place in places]
    metadata = [batch.metadata for batch in batches if batch.metadata is not None]
    return replace(
        batches[-1],
        sparse=side_by_side(parts),
        dense=torch.cat([batch.dense for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        weights=torch.cat([batch.weights for batch in batches]),
        metadata=pa.Table.from_batches(metadata).combine_chunks().to_batches()[0] if metadata else None,
        requests=None,
        teacher=None,
    )


def take_rows(batch: Batch, order: Tensor) -> Batch:
    """Rows of a batch in another order, each as often as it is named."""
    parts = [take_bags(batch.sparse.select(place, place + 1), order) for place in range(len(batch.sparse.keys))]
    return replace(
        batch,
        sparse=side_by_side(parts),
        dense=batch.dense[order],
        labels=batch.labels[order],
        weights=batch.weights[order],
        metadata=None if batch.metadata is None else batch.metadata.take(pa.array(order.numpy())),
        requests=None,
        teacher=None,
    )


def borrow_features(schema: Schema, batch: Batch, lender: Batch, features: Collection[str], rows: Tensor) -> Batch:
    """The batch, with some features as other rows have them.

    Args:
        lender: encoded for the same schema, with any number of rows.
        features: what is borrowed; of a sequence all of its fields, so that they stay aligned.
        rows: ``(batch,)`` int64: the lender's row whose values each row gets; -1 for a row that keeps its own.
    """
    borrows = rows >= 0
    own = torch.arange(len(batch))
    order = torch.where(borrows, len(batch) + rows, own)
    parts = []
    for place, key in enumerate(schema.sparse_keys):
        part = batch.sparse.select(place, place + 1)
        if key.feature in features:
            part = take_bags(join_bags([part, lender.sparse.select(place, place + 1)]), order)
        parts.append(part)
    is_borrowed = torch.zeros(schema.num_dense, dtype=torch.bool)
    for column in schema.dense_columns:
        is_borrowed[column.start : column.start + column.width] = column.name in features
    dense = torch.where(is_borrowed & borrows[:, None], lender.dense[rows.clamp(min=0)], batch.dense)
    return replace(batch, sparse=side_by_side(parts), dense=dense)


def join_bags(parts: Sequence[SparseFeatures]) -> SparseFeatures:
    """Bags of one key, those of each part behind those of the one before."""
    one = side_by_side(parts)
    return replace(one, keys=parts[0].keys, value_counts=(len(one.values),))


def take_bags(part: SparseFeatures, order: Tensor, starts: Tensor | None = None) -> SparseFeatures:
    """Bags of one key in another order, each as often as it is named.

    Args:
        starts: what ``starts_of`` says of the part, where it is asked again and again.
    """
    starts, lengths = (starts_of(part) if starts is None else starts)[order], part.lengths[order].long()
    starts_taken = torch.cumsum(lengths, 0) - lengths
    places = torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - starts_taken, lengths)
    weights = None if part.weights is None else part.weights[places]
    return SparseFeatures(part.keys, part.values[places], part.lengths[order], (len(places),), weights)


def starts_of(part: SparseFeatures) -> Tensor:
    """Where each bag of one key begins among the values."""
    lengths = part.lengths.long()
    return torch.cumsum(lengths, 0) - lengths


def side_by_side(parts: Sequence[SparseFeatures]) -> SparseFeatures:
    """One key behind another."""
    none = torch.zeros(0, dtype=torch.int64)
    weights = [part.weights for part in parts if part.weights is not None]
    return SparseFeatures(
        tuple(key for part in parts for key in part.keys),
        torch.cat([part.values for part in parts]) if parts else none,
        torch.cat([part.lengths for part in parts]) if parts else none.int(),
        tuple(count for part in parts for count in part.value_counts),
        torch.cat(weights) if weights else None,
    )
