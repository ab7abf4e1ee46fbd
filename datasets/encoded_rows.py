"""Many examples as numbers, whose slices become Batches.

Whole windows of rows are encoded at once, column by column, so that the cost of Python is paid per column and
window; cutting a batch afterwards is a few contiguous copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlenv.schema import Schema

if TYPE_CHECKING:
    import torch

    from mlenv.batch import Batch, Position, SparseFeatures

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Jagged:
    """Ids of one sparse key. Without offsets every bag holds exactly one id."""

    values: Integers
    offsets: Integers | None = None
    """``(rows + 1,)``: bag i is ``values[offsets[i]:offsets[i + 1]]``."""
    weights: Floats | None = None

    def rows(self, start: int, stop: int) -> Jagged:
        """Bags ``start`` to ``stop``, as views."""
        if self.offsets is None:
            return Jagged(self.values[start:stop])
        first, last = self.offsets[start], self.offsets[stop]
        weights = None if self.weights is None else self.weights[first:last]
        return Jagged(self.values[first:last], self.offsets[start : stop + 1] - first, weights)

    def take(self, order: Integers) -> Jagged:
        """Bags in another order."""
        if self.offsets is None:
            return Jagged(self.values[order])
        lengths = np.diff(self.offsets)[order]
        places, offsets = ranges(self.offsets[order], lengths)
        return Jagged(self.values[places], offsets, None if self.weights is None else self.weights[places])

    def lengths(self, rows: int) -> NDArray[np.int32]:
        """Ids per bag."""
        return np.ones(rows, np.int32) if self.offsets is None else np.diff(self.offsets).astype(np.int32)


@dataclass(frozen=True)
class EncodedRows:
    """Many examples as numbers. Row i of every part is the same example."""

    schema: Schema
    sparse: tuple[Jagged, ...]
    """In the order of ``schema.sparse_keys``."""
    dense: tuple[Floats, ...]
    """In the order of ``schema.dense_columns``: ``(rows,)``, or ``(rows, width)`` of a vector. Arrow's own memory where possible."""
    labels: Floats
    """``(rows, tasks)``."""
    weights: Floats
    """``(rows, tasks)``."""
    metadata: pa.RecordBatch | None
    requests: Integers | None
    """``(rows,)``, equal for rows of one request; -1 for a row without one."""
    teacher: Floats | None
    """``(rows, tasks)``; NaN where there is no prediction."""

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, start: int, stop: int) -> EncodedRows:
        """Rows ``start`` to ``stop``, as views."""
        return replace(
            self,
            sparse=tuple(jagged.rows(start, stop) for jagged in self.sparse),
            dense=tuple(column[start:stop] for column in self.dense),
            labels=self.labels[start:stop],
            weights=self.weights[start:stop],
            metadata=None if self.metadata is None else self.metadata.slice(start, stop - start),
            requests=None if self.requests is None else self.requests[start:stop],
            teacher=None if self.teacher is None else self.teacher[start:stop],
        )

    def take(self, order: Integers) -> EncodedRows:
        """Rows in another order."""
        return replace(
            self,
            sparse=tuple(jagged.take(order) for jagged in self.sparse),
            dense=tuple(column[order] for column in self.dense),
            labels=self.labels[order],
            weights=self.weights[order],
            metadata=None if self.metadata is None else self.metadata.take(pa.array(order)),
            requests=None if self.requests is None else self.requests[order],
            teacher=None if self.teacher is None else self.teacher[order],
        )


def join(parts: Sequence[EncodedRows]) -> EncodedRows:
    """Rows of several pieces one after the other; their metadata have the same types."""
    if len(parts) == 1:
        return parts[0]
    first, sizes = parts[0], [len(part) for part in parts]
    return replace(
        first,
        sparse=tuple(_join_jagged(pieces, sizes) for pieces in zip(*(part.sparse for part in parts), strict=True)),
        dense=tuple(_joined(columns) for columns in zip(*(part.dense for part in parts), strict=True)),
        labels=_joined([part.labels for part in parts]),
        weights=_joined([part.weights for part in parts]),
        metadata=None if first.metadata is None else _one_batch([part.metadata for part in parts]),
        requests=_joined_if_asked([part.requests for part in parts]),
        teacher=_joined_if_asked([part.teacher for part in parts]),
    )


def _join_jagged(pieces: Sequence[Jagged], sizes: Sequence[int]) -> Jagged:
    values = _joined([piece.values for piece in pieces])
    if all(piece.offsets is None for piece in pieces):
        return Jagged(values)
    ends = np.cumsum(_joined([piece.lengths(size) for piece, size in zip(pieces, sizes, strict=True)]), dtype=np.int64)
    weights = [piece.weights for piece in pieces if piece.weights is not None]
    return Jagged(values, np.concatenate([[0], ends]), _joined(weights) if weights else None)


def _one_batch(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.RecordBatch.from_struct_array(pa.concat_arrays([batch.to_struct_array() for batch in batches]))


def to_batch(parts: Sequence[EncodedRows], position: Position) -> Batch:
    """Lays consecutive pieces of rows out as one batch, key-major."""
    import torch

    from mlenv.batch import Batch  # here, because a server that encodes features needs no torch

    requests, teacher = _joined_if_asked([part.requests for part in parts]), _joined_if_asked([part.teacher for part in parts])
    return Batch(
        sparse=_sparse_features(parts),
        dense=torch.from_numpy(_dense_matrix(parts)),
        labels=torch.from_numpy(_joined([part.labels for part in parts])),
        weights=torch.from_numpy(_joined([part.weights for part in parts])),
        position=position,
        metadata=None if parts[0].metadata is None else _one_batch([part.metadata for part in parts]),
        requests=None if requests is None else torch.from_numpy(tell_apart(requests)),
        teacher=None if teacher is None else torch.from_numpy(teacher),
    )


def tell_apart(requests: Integers) -> Integers:
    """Rows without a request get a negative number of their own, so that each is a request by itself."""
    return np.where(requests < 0, -1 - np.arange(len(requests)), requests)


def ranges(starts: Integers, lengths: Integers) -> tuple[Integers, Integers]:
    """Places of several ranges one after the other, and the offsets of the ranges in them."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths), offsets


def _sparse_features(parts: Sequence[EncodedRows]) -> SparseFeatures:
    import torch

    from mlenv.batch import SparseFeatures

    keys = parts[0].schema.sparse_keys
    pieces = [[part.sparse[place] for part in parts] for place in range(len(keys))]
    values = _joined([piece.values for key in pieces for piece in key]) if keys else np.empty(0, np.int64)
    counts = tuple(sum(len(piece.values) for piece in key) for key in pieces)
    rows = sum(len(part) for part in parts)
    if all(piece.offsets is None for key in pieces for piece in key):
        lengths = _single_lengths(len(keys) * rows)
    else:
        lengths = torch.from_numpy(_joined([piece.lengths(len(part)) for key in pieces for part, piece in zip(parts, key, strict=True)]))
    weights = None
    if any(key.group == "weighted_bag" for key in keys):
        ones = (piece.weights if piece.weights is not None else np.ones(len(piece.values), np.float32) for key in pieces for piece in key)
        weights = torch.from_numpy(_joined(list(ones)))
    return SparseFeatures(tuple(key.name for key in keys), torch.from_numpy(values), lengths, counts, weights)


def _dense_matrix(parts: Sequence[EncodedRows]) -> Floats:
    """``(batch, num_dense)``, written once, column by column, while the columns of a batch are still in the cache."""
    schema = parts[0].schema
    dense = np.empty((sum(len(part) for part in parts), schema.num_dense), np.float32)
    first = 0
    for part in parts:
        for column, values in zip(schema.dense_columns, part.dense, strict=True):
            dense[first : first + len(part), column.start : column.start + column.width] = values.reshape(len(part), column.width)
        first += len(part)
    return dense


@lru_cache(maxsize=8)
def _single_lengths(bags: int) -> torch.Tensor:
    """Lengths of bags with one id each; nobody writes to them, so batches share them."""
    import torch

    return torch.ones(bags, dtype=torch.int32)


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One array that owns its memory, so that a batch does not keep a whole window alive."""
    return np.concatenate(arrays)


def _joined_if_asked(arrays: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """Of a part that all pieces have or none has."""
    present = [array for array in arrays if array is not None]
    return _joined(present) if present else None
