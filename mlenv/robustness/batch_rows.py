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
    parts = [_joined([batch.sparse.select(place, place + 1) for batch in batches]) for place in places]
    metadata = [batch.metadata for batch in batches if batch.metadata is not None]
    return replace(
        batches[-1],
        sparse=_assembled(first.sparse, parts),
        dense=torch.cat([batch.dense for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        weights=torch.cat([batch.weights for batch in batches]),
        metadata=pa.Table.from_batches(metadata).combine_chunks().to_batches()[0] if metadata else None,
        requests=None,
        teacher=None,
    )


def take_rows(batch: Batch, order: Tensor) -> Batch:
    """Rows of a batch in another order, each as often as it is named."""
    parts = [_taken(batch.sparse.select(place, place + 1), order) for place in range(len(batch.sparse.keys))]
    return replace(
        batch,
        sparse=_assembled(batch.sparse, parts),
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
            part = _taken(_joined([part, lender.sparse.select(place, place + 1)]), order)
        parts.append(part)
    is_borrowed = torch.zeros(schema.num_dense, dtype=torch.bool)
    for column in schema.dense_columns:
        is_borrowed[column.start : column.start + column.width] = column.name in features
    dense = torch.where(is_borrowed & borrows[:, None], lender.dense[rows.clamp(min=0)], batch.dense)
    return replace(batch, sparse=_assembled(batch.sparse, parts), dense=dense)


def _joined(parts: Sequence[SparseFeatures]) -> SparseFeatures:
    """Bags of one key, one piece after the other."""
    values = torch.cat([part.values for part in parts])
    weights = [part.weights for part in parts if part.weights is not None]
    lengths = torch.cat([part.lengths for part in parts])
    return SparseFeatures(parts[0].keys, values, lengths, (len(values),), torch.cat(weights) if weights else None)


def _taken(part: SparseFeatures, order: Tensor) -> SparseFeatures:
    """Bags of one key in another order, each as often as it is named."""
    all_lengths = part.lengths.long()
    starts, lengths = (torch.cumsum(all_lengths, 0) - all_lengths)[order], all_lengths[order]
    starts_taken = torch.cumsum(lengths, 0) - lengths
    places = torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - starts_taken, lengths)
    weights = None if part.weights is None else part.weights[places]
    return SparseFeatures(part.keys, part.values[places], part.lengths[order], (len(places),), weights)


def _assembled(like: SparseFeatures, parts: Sequence[SparseFeatures]) -> SparseFeatures:
    """Keys one after the other again."""
    if not parts:
        return like
    weights = [part.weights for part in parts if part.weights is not None]
    return SparseFeatures(
        like.keys,
        torch.cat([part.values for part in parts]),
        torch.cat([part.lengths for part in parts]),
        tuple(part.value_counts[0] for part in parts),
        torch.cat(weights) if weights else None,
    )
