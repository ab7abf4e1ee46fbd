"""From Arrow columns to numbers: a RecordBatch becomes EncodedRows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlenv.datasets.columns import ReadColumns
from mlenv.datasets.encoded_rows import EncodedRows, Floats, Integers, Jagged, ranges
from mlenv.datasets.hashing import as_int64, hash_ids
from mlenv.datasets.lists import as_list, list_lengths
from mlenv.schema import Binary, DenseColumn, DenseVector, Feature, Numeric, Schema, SparseKey, Table

if TYPE_CHECKING:
    from mlenv.batch import Extra


class RowError(Exception):
    """A value that cannot be encoded; the source that knows the file turns it into a DataError."""

    def __init__(self, row: int, column: str, *, expected: str, received: object, fix: str = "") -> None:
        super().__init__(f"row {row}, column {column!r}: expected {expected}, received {received!r}")
        self.row, self.column, self.expected, self.received, self.fix = row, column, expected, received, fix


def encode(
    rows: pa.RecordBatch,
    schema: Schema,
    *,
    extras: Collection[Extra] = (),
    carried: tuple[str, ...] = (),
    has_labels: bool = True,
) -> EncodedRows:
    """Turns the columns that the schema names into numbers. Column types were checked by ``check_columns``; see ReadColumns.

    Raises:
        RowError: names the first row whose value cannot be used.
    """
    sparse, dense = encode_features(rows, schema)
    labels, weights = _encode_labels(rows, schema) if has_labels else _no_labels(rows.num_rows, schema)
    passed = ReadColumns(schema=schema, carried=carried, has_labels=has_labels).metadata
    metadata = rows.select(list(passed)) if "metadata" in extras else None
    requests = _encode_requests(rows.column(schema.request)) if "requests" in extras else None
    teacher = _encode_teacher(rows, schema) if "teacher" in extras else None
    return EncodedRows(schema, sparse, dense, labels, weights, metadata, requests, teacher)


def encode_missing(schema: Schema) -> tuple[dict[str, int], Floats]:
    """What a row of nulls becomes: row of the table by sparse key, for those keys whose null is an id and no empty bag; and the
    dense columns, ``(num_dense,)``."""
    ids, dense = {}, np.zeros(schema.num_dense, np.float32)
    for key in schema.sparse_keys:
        if key.default is not None:
            nothing = pa.nulls(1, pa.int64() if key.storage == "int64" else pa.string())
            ids[key.name] = int(_encode_single(nothing, key, schema.tables[key.table]).values[0])
    for column in schema.dense_columns:
        feature = schema.features[column.name]
        if not isinstance(feature, DenseVector):
            nothing = pa.record_batch({column.column: pa.nulls(1, pa.bool_() if isinstance(feature, Binary) else pa.float64())})
            dense[column.start] = _encode_dense(nothing, column, feature)[0]
    return ids, dense


def encode_features(rows: pa.RecordBatch, schema: Schema) -> tuple[tuple[Jagged, ...], tuple[Floats, ...]]:
    """The features alone, which is all that a server has: ``EncodedRows.sparse`` and ``EncodedRows.dense``.

    Raises:
        RowError: see encode.
    """
    _check_aligned(rows, schema)
    sparse = tuple(_encode_key(rows.column(key.column), key, schema.tables[key.table]) for key in schema.sparse_keys)
    return sparse, tuple(_encode_dense(rows, column, schema.features[column.name]) for column in schema.dense_columns)


def _encode_key(column: pa.Array, key: SparseKey, table: Table) -> Jagged:
    if key.group == "single":
        return _encode_single(column, key, table)
    elements, offsets = _elements(column, key.max_length, key.keep)
    weights = None
    if key.group == "weighted_bag":
        elements, column_of_weights = elements.flatten()  # a null pair makes both of its parts null
        weights = _floats(column_of_weights, default=0.0)
        if not np.isfinite(weights).all():
            row = int(np.searchsorted(offsets, int(np.argmin(np.isfinite(weights))), side="right")) - 1
            raise RowError(row, key.column, expected="finite weights", received=str(weights[~np.isfinite(weights)][0]))
    if elements.null_count:
        elements, offsets, weights = _without_nulls(elements, offsets, weights, key)
    values = _table_rows(elements, key, table, lambda place: int(np.searchsorted(offsets, place, side="right")) - 1)
    return Jagged(values, offsets, weights)


def _encode_single(column: pa.Array, key: SparseKey, table: Table) -> Jagged:
    if column.null_count and key.default is not None:
        column = pc.fill_null(_plain(column), pa.scalar(key.default).cast(_plain_type(column)))
    if not column.null_count:
        return Jagged(_table_rows(column, key, table, lambda place: place))
    present = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    offsets = np.zeros(len(column) + 1, np.int64)
    offsets[present + 1] = 1
    return Jagged(_table_rows(column.drop_null(), key, table, lambda place: int(present[place])), np.cumsum(offsets))


def _table_rows(ids: pa.Array, key: SparseKey, table: Table, row_of: Callable[[int], int]) -> Integers:
    """Rows of the table for ids without nulls; ``row_of`` says which example an id belongs to, for the message."""
    if table.ids == "hash":
        return (hash_ids(ids) % np.uint64(table.num_embeddings)).view(np.int64)
    if table.ids == "index":
        rows = as_int64(ids)
        # One pass finds both ends: a negative id is a huge unsigned one.
        if not len(rows) or rows.view(np.uint64).max() < table.num_embeddings:
            return rows
        unknown = (rows < 0) | (rows >= table.num_embeddings)
        spare, expected = 0, f"an id in [0, {table.num_embeddings})"
        remedy = f"raise num_embeddings of table {key.table!r}"
    else:
        known = pa.array(table.vocabulary).cast(_plain_type(ids))
        found = pc.index_in(_plain(ids), value_set=known)
        unknown = found.is_null().to_numpy(zero_copy_only=False)
        rows = found.fill_null(0).cast(pa.int64()).to_numpy()
        spare, expected = len(table.vocabulary), f"an id of the vocabulary of table {key.table!r}"
        remedy = "add it to the vocabulary"
    if unknown.any() and table.out_of_range == "error":
        place = int(np.argmax(unknown))
        raise RowError(
            row_of(place), key.column, expected=expected, received=ids[place].as_py(), fix=f"{remedy}, or set its out_of_range to 'hash'"
        )
    rows = rows.copy()
    hashed = hash_ids(ids.filter(pa.array(unknown))) % np.uint64(table.num_embeddings - spare)
    rows[unknown] = hashed.view(np.int64) + spare
    return rows


def _elements(column: pa.Array, max_length: int, keep: str) -> tuple[pa.Array, Integers]:
    """The elements of a list column, cut to ``max_length`` per row, and their offsets; a null list is empty."""
    column = as_list(column)
    lengths = list_lengths(column)
    if max_length and len(lengths) and lengths.max() > max_length:
        ends = np.cumsum(lengths)
        kept = np.minimum(lengths, max_length)
        places, offsets = ranges(ends - kept if keep == "last" else ends - lengths, kept)
        return column.flatten().take(pa.array(places)), offsets
    return column.flatten(), np.concatenate([[0], np.cumsum(lengths)])


def _without_nulls(
    elements: pa.Array, offsets: Integers, weights: Floats | None, key: SparseKey
) -> tuple[pa.Array, Integers, Floats | None]:
    """Bags without their null ids. In a sequence a null would shift the fields against each other, so it is refused."""
    valid = elements.is_valid().to_numpy(zero_copy_only=False)
    if key.group == "sequence":
        row = int(np.searchsorted(offsets, int(np.argmin(valid)), side="right")) - 1
        raise RowError(row, key.column, expected="a list without null elements", received=None, fix="write an id that stands for unknown")
    kept = np.concatenate([[0], np.cumsum(valid)])
    return elements.drop_null(), kept[offsets], None if weights is None else weights[valid]


def _check_aligned(rows: pa.RecordBatch, schema: Schema) -> None:
    """Fields of one sequence have equal lengths in every row, before they are cut."""
    leaders: dict[str, tuple[str, Integers]] = {}
    for key in (key for key in schema.sparse_keys if key.group == "sequence"):
        lengths = list_lengths(rows.column(key.column))
        column, expected = leaders.setdefault(key.feature, (key.column, lengths))
        if not np.array_equal(lengths, expected):
            row = int(np.argmax(lengths != expected))
            fix = f"write aligned lists for sequence {key.feature!r}"
            raise RowError(
                row, key.column, expected=f"as many elements as column {column!r}, {expected[row]}", received=int(lengths[row]), fix=fix
            )


def _encode_dense(rows: pa.RecordBatch, column: DenseColumn, feature: Feature) -> Floats:
    values = rows.column(column.column)
    if isinstance(feature, DenseVector):
        return _vectors(values, column)
    if isinstance(feature, Binary):
        return _flags(values, column.column, default=feature.default)
    assert isinstance(feature, Numeric)
    floats = _floats(values, default=np.nan if feature.default is None else feature.default)
    _check_finite(floats, column.column)
    return floats


def _vectors(values: pa.Array, column: DenseColumn) -> Floats:
    lengths = pc.list_value_length(values)
    wrong = pc.fill_null(pc.not_equal(lengths, column.width), False).to_numpy(zero_copy_only=False)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise RowError(row, column.column, expected=f"a vector of {column.width} numbers", received=f"{lengths[row].as_py()} numbers")
    vectors = np.zeros((len(values), column.width), np.float32)
    present = values.is_valid().to_numpy(zero_copy_only=False)
    vectors[present] = _floats(values.drop_null().flatten(), default=0.0).reshape(-1, column.width)
    _check_finite(vectors, column.column)
    return vectors


def _check_finite(floats: Floats, column: str) -> None:
    """Refuses infinities, which would spread through means and sums to every example."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(floats.sum()):  # one pass for most columns; NaN, which may pass, goes on
            return
    if np.isinf(np.fmax.reduce(floats, axis=None, initial=0)) or np.isinf(np.fmin.reduce(floats, axis=None, initial=0)):  # past NaN
        row, *_ = np.argwhere(np.isinf(floats))[0]
        raise RowError(
            int(row), column, expected="a finite number", received=str(floats[row]), fix="write null where the value is not known"
        )


def _encode_labels(rows: pa.RecordBatch, schema: Schema) -> tuple[Floats, Floats]:
    labels = np.empty((rows.num_rows, len(schema.labels)), np.float32)
    weights = np.empty_like(labels)
    for place, (task, label) in enumerate(schema.labels.items()):
        weight = _floats(rows.column(label.weight), default=np.nan) if label.weight else np.ones(rows.num_rows, np.float32)
        usable = (weight >= 0) & np.isfinite(weight)
        if label.weight and not usable.all():
            row = int(np.argmin(usable))
            raise RowError(row, label.weight, expected="a finite weight >= 0", received=rows.column(label.weight)[row].as_py())
        if label.mask:
            weight = weight * _flags(rows.column(label.mask), label.mask, default=False)
        name = label.column or task
        values = _floats(rows.column(name), default=np.nan)
        wrong = (values != 0) & (values != 1) & (weight > 0)
        if wrong.any():
            row = int(np.argmax(wrong))
            fix = f"write 0 or 1, or name a mask column in labels.{task}.mask that is false here"
            raise RowError(row, name, expected="a label 0 or 1", received=rows.column(name)[row].as_py(), fix=fix)
        labels[:, place] = np.where(weight > 0, values, 0)
        weights[:, place] = weight
    return labels, weights


def _no_labels(num_rows: int, schema: Schema) -> tuple[Floats, Floats]:
    """Weights of 0 hide the labels of every row."""
    shape = num_rows, len(schema.labels)
    return np.zeros(shape, np.float32), np.zeros(shape, np.float32)


def _encode_requests(column: pa.Array) -> Integers:
    """A hash of 63 bits per request; -1 without one."""
    plain = _plain(column)
    known = pc.invert(plain.is_null(nan_is_null=True))
    ids = plain.filter(known)
    hashes = hash_ids(ids if pa.types.is_integer(ids.type) else ids.cast(pa.large_string()))
    requests = np.full(len(plain), -1, np.int64)
    requests[known.to_numpy(zero_copy_only=False)] = (hashes >> np.uint64(1)).view(np.int64)
    return requests


def _encode_teacher(rows: pa.RecordBatch, schema: Schema) -> Floats:
    teacher = np.full((rows.num_rows, len(schema.labels)), np.nan, np.float32)
    for place, label in enumerate(schema.labels.values()):
        if label.teacher:
            predictions = _floats(rows.column(label.teacher), default=np.nan)
            wrong = (predictions < 0) | (predictions > 1)
            if wrong.any():
                row = int(np.argmax(wrong))
                fix = "write probabilities, not logits, and null where the teacher has none"
                received = rows.column(label.teacher)[row].as_py()
                raise RowError(row, label.teacher, expected="a prediction in [0, 1]", received=received, fix=fix)
            teacher[:, place] = predictions
    return teacher


def _flags(values: pa.Array, column: str, *, default: bool) -> Floats:
    flags = _floats(values, default=float(default))
    wrong = (flags != 0) & (flags != 1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise RowError(row, column, expected="0 or 1", received=values[row].as_py())
    return flags


def _floats(values: pa.Array, *, default: float) -> Floats:
    """A number column as float32; null and NaN become the default."""
    floats: Floats = values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    if not np.isnan(np.min(floats, initial=0)):  # one pass without a mask; NaN wins every comparison of numpy's
        return floats
    return np.where(np.isnan(floats), np.float32(default), floats)


def _plain_type(ids: pa.Array) -> pa.DataType:
    return ids.type.value_type if pa.types.is_dictionary(ids.type) else ids.type


def _plain(ids: pa.Array) -> pa.Array:
    return ids.cast(_plain_type(ids)) if pa.types.is_dictionary(ids.type) else ids
