"""What the columns of a file must be for a schema; checked before any row is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from mlenv.errors import DataError, MlenvError, nearest
from mlenv.schema import Binary, DenseVector, Schema

if TYPE_CHECKING:
    from mlenv.batch import Extra


@dataclass(frozen=True, kw_only=True)
class ReadColumns:
    """What of the data a source reads for a schema."""

    schema: Schema
    extras: Collection[Extra] = ()
    """Parts of the batches that are made beside features and labels."""
    carried: tuple[str, ...] = ()
    """Columns of the metadata beside those of the schema."""
    has_labels: bool = True
    """Whether there are labels; without, none of their columns is read."""

    @property
    def metadata(self) -> tuple[str, ...]:
        """Columns that pass through, each once."""
        hidden = () if self.has_labels else self.schema.label_columns
        return tuple(dict.fromkeys([*(name for name in self.schema.metadata_columns if name not in hidden), *self.carried]))

    @property
    def of_extras(self) -> tuple[str, ...]:
        """Columns that the extras are made from, each once."""
        teachers = (label.teacher for label in self.schema.labels.values())
        columns: dict[Extra, Iterable[str]] = {"metadata": self.metadata, "requests": (self.schema.request,), "teacher": teachers}
        return tuple(dict.fromkeys(name for extra in self.extras for name in columns[extra] if name))

    @property
    def all(self) -> tuple[str, ...]:
        """Every column, each once."""
        own = self.schema.columns if self.has_labels else self.schema.feature_columns
        return tuple(dict.fromkeys((*own, *self.of_extras)))


def check_columns(
    columns: pa.Schema,
    schema: Schema,
    place: str,
    *,
    extras: Collection[Extra] = (),
    carried: tuple[str, ...] = (),
    has_labels: bool = True,
) -> Iterator[MlenvError]:
    """Yields an error for every column that is missing or whose type the schema does not accept; see ReadColumns."""
    read = ReadColumns(schema=schema, extras=extras, carried=carried, has_labels=has_labels)
    types = {field.name: field.type for field in columns}
    for name in (name for name in read.all if name not in types):
        fix = f"write the column, or take it out of the schema; {nearest(name, types)}"
        yield DataError(f"{place}, column {name!r}", expected="a column of this name", received="none", fix=fix)
    hidden = () if has_labels else schema.label_columns
    for column, expected, accepts in _expected_types(schema):
        if column in hidden:
            continue
        if column in types and not accepts(types[column]):
            fix = "write the column with that type, or change the schema"
            yield DataError(f"{place}, column {column!r}", expected=expected, received=str(types[column]), fix=fix)


def _expected_types(schema: Schema) -> Iterator[tuple[str, str, Callable[[pa.DataType], bool]]]:
    """For each column that is read: its name, what it should hold in words, and the test for it."""
    for key in schema.sparse_keys:
        is_id = pa.types.is_integer if key.storage == "int64" else _is_text
        if key.group == "single":
            yield key.column, key.storage, is_id
        elif key.group == "weighted_bag":
            yield key.column, f"map<{key.storage}, float> or list<struct<id: {key.storage}, weight: float>>", partial(_is_pairs, is_id)
        else:
            yield key.column, f"list<{key.storage}>", partial(_is_list, is_id)
    for dense in schema.dense_columns:
        feature = schema.features[dense.name]
        if isinstance(feature, DenseVector):
            yield dense.column, f"list<float> of {feature.dim}", partial(_is_list, _is_number)
        elif isinstance(feature, Binary):
            yield dense.column, "bool, or integers 0 and 1", _is_flag
        else:
            yield dense.column, "a number", _is_number
    for name in (*schema.row_key, schema.request, schema.event_time, *schema.segments):
        yield name, "a plain value, no list or map", _is_plain
    for task, label in schema.labels.items():
        if label.truth:
            yield label.truth, "a probability", _is_number
        if label.teacher:
            yield label.teacher, "a probability", _is_number
        yield label.column or task, "a number 0 or 1, or bool", _is_number
        if label.mask:
            yield label.mask, "bool, or integers 0 and 1", _is_flag
        if label.weight:
            yield label.weight, "a number", _is_number


def _is_plain(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(kind)


def _is_number(kind: pa.DataType) -> bool:
    return any(is_type(kind) for is_type in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal))


def _is_flag(kind: pa.DataType) -> bool:
    return any(is_type(kind) for is_type in (pa.types.is_boolean, pa.types.is_integer))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(is_type(kind) for is_type in (pa.types.is_string, pa.types.is_large_string))


def _is_list(is_element: Callable[[pa.DataType], bool], kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and is_element(kind.value_type)


def _is_pairs(is_id: Callable[[pa.DataType], bool], kind: pa.DataType) -> bool:
    if pa.types.is_map(kind):
        return is_id(kind.key_type) and _is_number(kind.item_type)
    pair = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
    return (
        pair is not None
        and pa.types.is_struct(pair)
        and pair.num_fields == 2
        and is_id(pair.field(0).type)
        and _is_number(pair.field(1).type)
    )
