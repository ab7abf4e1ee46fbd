"""Some rows of a window, held in memory, whose features can be exchanged between rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mlenv.batch import START, Batch
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.inference.batch_rows import join_bags, side_by_side, starts_of, take_bags
from mlenv.schema import Schema


class RowSample:
    """Rows of batches, in their order, of which any may be taken with features of others.

    Args:
        batches: at least one, all encoded for the schema.
    """

    def __init__(self, batches: Sequence[Batch], schema: Schema) -> None:
        self.schema = schema
        keys = range(len(schema.sparse_keys))
        self._bags = [join_bags([batch.sparse.select(key, key + 1) for batch in batches]) for key in keys]
        self._starts = [starts_of(part) for part in self._bags]
        self.dense = torch.cat([batch.dense for batch in batches])
        self.labels = torch.cat([batch.labels for batch in batches])
        self.weights = torch.cat([batch.weights for batch in batches])
        metadata = [batch.metadata for batch in batches if batch.metadata is not None]
        self.metadata = pa.Table.from_batches(metadata).combine_chunks() if metadata else None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def take(self, rows: Tensor, features: Collection[str] = (), others: Tensor | None = None) -> Batch:
        """
        Args:
            rows: ``(batch,)`` int64, places in the sample.
            features: which are taken from the rows ``others``, as long as ``rows``: all of a feature together, its ids with their
                weights, the fields of a sequence.
        """
        others = rows if others is None else others
        bags = [
            take_bags(part, others if key.feature in features else rows, starts)
            for key, part, starts in zip(self.schema.sparse_keys, self._bags, self._starts, strict=True)
        ]
        dense = self.dense[rows]
        for column in (column for column in self.schema.dense_columns if column.name in features):
            where = slice(column.start, column.start + column.width)
            dense[:, where] = self.dense[others, where]
        metadata = None
        if self.metadata is not None:
            metadata = pa.RecordBatch.from_struct_array(self.metadata.take(pa.array(rows.numpy())).to_struct_array().combine_chunks())
        return Batch(side_by_side(bags), dense, self.labels[rows], self.weights[rows], START, metadata)

    def batches(self, batch_size: int, features: Collection[str] = (), order: Tensor | None = None) -> Iterator[Batch]:
        """All rows, some at a time; with an order, ``(rows,)``, each has the features of another row."""
        for first in range(0, len(self), batch_size):
            rows = torch.arange(first, min(first + batch_size, len(self)))
            yield self.take(rows, features, None if order is None else order[rows])


def read_sample(source: ParquetSource, num_rows: int, seed: int = 0) -> RowSample:
    """So many rows of a window, any as likely as any other; all rows where there are no more.

    Raises:
        DataError: the transforms leave no row, or one cannot be read.
    """
    total = source.num_rows
    if not total:
        raise source.nothing_left()
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(num_rows, total), replace=False))
    parts, first = [], 0
    for batch in source.batches():
        mine = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, first + len(batch))] - first
        first += len(batch)
        if len(mine) == len(batch):
            parts.append(batch)
        elif len(mine):
            parts.append(RowSample([batch], source.schema).take(torch.from_numpy(mine)))
    return RowSample(parts, source.schema)
