"""The columns that a served model reads: their types, and rows of JSON as such columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from mlenv.errors import MlenvError
from mlenv.schema import Binary, Numeric, Schema

MAX_PROBLEMS = 20
"""Wrong values that one answer names."""


@dataclass(frozen=True)
class RowProblem:
    """A value of a request that cannot be used."""

    row: int
    """From 0."""
    field: str
    expected: str
    received: str

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)


class RowsError(MlenvError):
    """Rows that cannot be scored; names row and field of each wrong value, up to ``MAX_PROBLEMS``."""

    def __init__(self, problems: Sequence[RowProblem]) -> None:
        self.problems = tuple(problems)
        lines = [f"row {one.row}, field {one.field!r}: expected {one.expected}. Received: {one.received}." for one in problems]
        super().__init__("\n".join(lines))


def served_columns(schema: Schema, segments: Iterable[str], stored: pa.Schema) -> pa.Schema:
    """What a request holds of each row: every column that a feature or a calibrator reads, in a type that JSON can say.

    Args:
        segments: columns that calibrators read.
        stored: the columns as the features find them in the log, after its transforms.
    """
    types = {name: plain_type(stored.field(name).type) for name in schema.feature_columns}
    for column in schema.dense_columns:
        feature = schema.features[column.name]
        if isinstance(feature, (Numeric, Binary)):
            types[column.column] = pa.float64() if isinstance(feature, Numeric) else pa.bool_()
    for name in segments:
        types.setdefault(name, pa.string())
    return pa.schema([pa.field(name, kind) for name, kind in types.items()])


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Bool, 64-bit integers, 64-bit floats and strings; lists and maps of them; pairs of id and weight."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_boolean(kind) or pa.types.is_uint64(kind):
        return kind
    if pa.types.is_integer(kind):
        return pa.int64()
    return pa.float64() if pa.types.is_floating(kind) or pa.types.is_decimal(kind) else pa.string()


def describe(columns: pa.Schema, row_key: pa.Schema, schema: Schema) -> list[dict[str, str]]:
    """For people: each column, what it holds, and the features that read it."""
    readers: dict[str, list[str]] = {}
    for column, feature in ((key.column, key.feature) for key in schema.sparse_keys):
        readers.setdefault(column, []).append(feature)
    for dense in schema.dense_columns:
        readers.setdefault(dense.column, []).append(dense.name)
    return [
        {"name": field.name, "type": expected(field.type), "features": ", ".join(dict.fromkeys(readers.get(field.name, ["(segment)"])))}
        for field in columns
    ] + [{"name": field.name, "type": expected(field.type), "features": "(row key, for the log; may be left out)"} for field in row_key]


def expected(kind: pa.DataType) -> str:
    """A type in the words of JSON."""
    if pa.types.is_map(kind):
        return f"an object from {expected(kind.key_type)} to {expected(kind.item_type)}"
    if pa.types.is_struct(kind):
        return f"an object with {' and '.join(f'{field.name}, {expected(field.type)}' for field in kind)}"
    if pa.types.is_list(kind):
        return f"a list of {expected(kind.value_type).removeprefix('a ').removeprefix('an ')}s"
    if pa.types.is_boolean(kind):
        return "true, false, 0 or 1"
    if pa.types.is_integer(kind):
        return "an integer"
    return "a number" if pa.types.is_floating(kind) else "a string"


def from_rows(rows: Sequence[Mapping[str, Any]], columns: pa.Schema) -> pa.RecordBatch:
    """Rows of JSON as columns. Every column must be there, if only as null; others are passed over.

    Raises:
        RowsError: names rows and fields that are missing or of another type.
    """
    problems: list[RowProblem] = []
    arrays = []
    for field in columns:
        values = [row.get(field.name, _MISSING) for row in rows]
        try:
            arrays.append(_array(values, field.type))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            problems += [
                RowProblem(row, field.name, expected(field.type), "nothing" if value is _MISSING else _brief(value))
                for row, value in enumerate(values)
                if not _fits(value, field.type)
            ]
    if problems:
        raise RowsError(sorted(problems, key=lambda problem: problem.row)[:MAX_PROBLEMS])
    return pa.RecordBatch.from_arrays(arrays, schema=columns)


def row_keys(rows: Sequence[Mapping[str, Any]], row_key: pa.Schema) -> pa.RecordBatch:
    """The row keys of rows of JSON, null where a row brings none.

    Raises:
        RowsError: names rows and fields that are of another type.
    """
    return from_rows([{name: row.get(name) for name in row_key.names} for row in rows], row_key)


class _Missing:
    """What a row holds where a field is not in it; Arrow takes it for no value of any type."""


_MISSING = _Missing()


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    return pa.array([_as_arrow(value, kind) for value in values], kind)


def _as_arrow(value: Any, kind: pa.DataType) -> Any:
    """A value of JSON as Arrow takes it without bending it: Arrow would read 1.0 as an integer, and cut what is no number."""
    if value is None:
        return None
    if pa.types.is_map(kind):
        if not isinstance(value, Mapping):
            raise TypeError
        is_integer = pa.types.is_integer(kind.key_type)
        return [(int(key) if is_integer else key, _as_arrow(item, kind.item_type)) for key, item in value.items()]
    if pa.types.is_list(kind):
        if not isinstance(value, list):
            raise TypeError
        return [_as_arrow(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        if not isinstance(value, Mapping) or {field.name for field in kind} != set(value):
            raise TypeError
        return {field.name: _as_arrow(value[field.name], field.type) for field in kind}
    if pa.types.is_boolean(kind):
        if value in (0, 1) and isinstance(value, (bool, int)):
            return bool(value)
        raise TypeError
    wanted = int if pa.types.is_integer(kind) else (int, float) if pa.types.is_floating(kind) else str
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise TypeError
    return value


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        _array([value], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
