"""Features that a log holds as a server saw them, encoded for a model: labels and columns before the transforms are not needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mlenv.batch import START, Batch
from mlenv.datasets.columns import check_columns
from mlenv.datasets.encoded_rows import EncodedRows, to_batch
from mlenv.datasets.encoding import RowError, encode_features
from mlenv.errors import DataError, Problems
from mlenv.robustness.parquet_log import ParquetLog
from mlenv.schema import Binary, DenseVector, Schema


def columns_of_features(schema: Schema) -> dict[str, tuple[str, ...]]:
    """Columns that each feature reads."""
    columns: dict[str, list[str]] = {name: [] for name in schema.features}
    for key in schema.sparse_keys:
        columns[key.feature].append(key.column)
    for dense in schema.dense_columns:
        columns[dense.name].append(dense.column)
    return {name: tuple(read) for name, read in columns.items()}


def logged_features(log: ParquetLog, schema: Schema) -> tuple[str, ...]:
    """Features all of whose columns are in the log.

    Raises:
        Problems: a column has another type than the schema says.
    """
    there = pa.schema([(name, kind) for name, kind in log.columns.items() if name in schema.feature_columns])
    place = f"{log.place} {log.path}"
    wrong = [error for error in check_columns(there, schema, place) if isinstance(error, DataError) and error.received != "none"]
    if wrong:
        raise Problems(f"features of {place}", wrong)
    return tuple(name for name, columns in columns_of_features(schema).items() if all(column in log.columns for column in columns))


def encode_logged(table: pa.Table, schema: Schema, metadata: Sequence[str], place: str, first_row: int = 0) -> Batch:
    """Rows without labels as a batch; a feature whose columns are not in the table is null.

    Args:
        metadata: columns that the batch carries.
        first_row: what the message calls the first row.

    Raises:
        DataError: a value cannot be used.
    """
    num_rows = table.num_rows
    columns = {
        name: table.column(name).combine_chunks() if name in table.column_names else pa.nulls(num_rows, kind)
        for name, kind in _types(schema).items()
    }
    try:
        sparse, dense = encode_features(pa.RecordBatch.from_pydict(columns), schema)
    except RowError as error:
        where = f"{place}, row {first_row + error.row}, column {error.column!r}"
        raise DataError(where, expected=error.expected, received=error.received, fix=error.fix) from error
    nothing = np.zeros((num_rows, len(schema.tasks)), np.float32)
    carried = pa.RecordBatch.from_pydict({name: table.column(name).combine_chunks() for name in metadata})
    return to_batch([EncodedRows(schema, sparse, dense, nothing, nothing, carried, None, None)], START)


def _types(schema: Schema) -> dict[str, pa.DataType]:
    """By column, a type that its features accept."""
    types: dict[str, pa.DataType] = {}
    for key in schema.sparse_keys:
        ids = pa.int64() if key.storage == "int64" else pa.string()
        types[key.column] = {"single": ids, "weighted_bag": pa.map_(ids, pa.float32())}.get(key.group, pa.list_(ids))
    for column in schema.dense_columns:
        feature = schema.features[column.name]
        kind = pa.list_(pa.float32()) if isinstance(feature, DenseVector) else pa.bool_() if isinstance(feature, Binary) else pa.float64()
        types.setdefault(column.column, kind)
    return types
