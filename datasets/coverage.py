"""How much of each feature is there."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from mlenv.datasets.encoding import as_list, list_lengths
from mlenv.schema import Schema


def feature_coverage(batches: Iterable[pa.RecordBatch], schema: Schema) -> dict[str, float]:
    """Share of rows in which each feature is neither null nor an empty list, by feature; a sequence counts by its first field."""
    columns = {key.feature: key.column for key in reversed(schema.sparse_keys)} | {
        dense.name: dense.column for dense in schema.dense_columns
    }
    present, rows = dict.fromkeys(schema.features, 0), 0
    for batch in batches:
        rows += batch.num_rows
        for feature in present:
            present[feature] += _num_present(batch.column(columns[feature]))
    return {feature: count / max(rows, 1) for feature, count in present.items()}


def _num_present(column: pa.Array) -> int:
    if pa.types.is_nested(column.type) and not pa.types.is_fixed_size_list(column.type):
        return int(np.count_nonzero(list_lengths(as_list(column))))
    return len(column) - int(column.null_count)
