"""A log of Parquet files that is read column by column, and which rows of two logs are the same."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlenv.datasets.parquet_source import NoFilesError, list_files, open_folder, partitions
from mlenv.errors import ConfigError, DataError, nearest
from mlenv.robustness.value_distance import comparable_ids

Ints = NDArray[np.int64]

_ROW: Final = "__row"


@dataclass(frozen=True)
class KeyColumn:
    """A part of what tells rows apart, and what it is called in two logs."""

    first: str
    second: str


def key_from(texts: Sequence[str]) -> tuple[KeyColumn, ...]:
    """Of ``NAME``, or ``NAME=NAME`` where the second log calls it otherwise."""
    return tuple(KeyColumn(first, second or first) for first, _, second in (text.partition("=") for text in texts))


class ParquetLog:
    """All Parquet files under a path, in the order of their names, as one table.

    Args:
        place: what named the path, for messages.

    Raises:
        ConfigError: nothing is there.
        DataError: a file is no Parquet file, or has a column with a type that does not go with the other files'.
    """

    def __init__(self, path: str, place: str) -> None:
        self.path, self.place = path, place
        self._filesystem, folder = open_folder(path)
        try:
            files = list_files(self._filesystem, folder, "")
        except NoFilesError:
            files = []
        if not files:
            raise ConfigError(place, expected="a Parquet file, or a folder of them", received=path, fix="name the folder of the log")
        self._folders = {file: partitions(file) for file in files}
        self._footers = {file: self._read_footer(file) for file in files}
        self.columns = self._common_columns()
        self.num_rows = sum(footer.num_rows for footer in self._footers.values())

    def check_columns(self, names: Collection[str], what: str) -> None:
        """
        Raises:
            DataError: the log lacks one of them.
        """
        for name in names:
            if name not in self.columns:
                fix = f"name another column, or write it; {nearest(name, self.columns)}"
                raise DataError(f"{self.place} {self.path}, column {name!r}", expected=what, received="no such column", fix=fix)

    def read(self, names: Sequence[str]) -> pa.Table:
        """Columns of all rows, each in its common type."""
        return pa.concat_tables(self.tables(names))

    def tables(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """The same, file by file."""
        schema = pa.schema([pa.field(name, self.columns[name]) for name in names])
        for file in self._footers:
            yield self._read(file, schema)

    def _read(self, file: str, schema: pa.Schema) -> pa.Table:
        folders = self._folders[file]
        stored = [name for name in schema.names if name not in folders]
        try:
            table = pq.read_table(file, filesystem=self._filesystem, columns=stored, partitioning=None)
            num_rows = self._footers[file].num_rows
            arrays = [
                pa.chunked_array([pa.repeat(folders[field.name], num_rows)]) if field.name in folders else table.column(field.name)
                for field in schema
            ]
            plain = [
                array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) and array.type != field.type else array
                for array, field in zip(arrays, schema, strict=True)
            ]
            return pa.table([array.cast(field.type) for array, field in zip(plain, schema, strict=True)], schema=schema)
        except (OSError, pa.ArrowException) as error:
            fix = "write the file again, or take it out of the folder"
            raise DataError(file, expected="readable pages", received=" ".join(str(error).split()), fix=fix) from error

    def _read_footer(self, file: str) -> pq.FileMetaData:
        try:
            return pq.read_metadata(file, filesystem=self._filesystem)
        except (OSError, pa.ArrowException) as error:
            fix = "write the file again, or take it out of the folder"
            raise DataError(file, expected="a whole Parquet file", received=" ".join(str(error).split()), fix=fix) from error

    def _common_columns(self) -> dict[str, pa.DataType]:
        """Columns that all files have, with types that hold the values of each."""
        common: dict[str, pa.DataType] | None = None
        for file, footer in self._footers.items():
            stored = {field.name: _plain(field.type) for field in footer.schema.to_arrow_schema()}
            found = stored | dict.fromkeys(self._folders[file], pa.string())
            names = [name for name in (found if common is None else common) if name in found]
            common = {name: found[name] if common is None else _wider(file, name, common[name], found[name]) for name in names}
        return common or {}


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _wider(file: str, name: str, kind: pa.DataType, other: pa.DataType) -> pa.DataType:
    try:
        schemas = [pa.schema([(name, one)]) for one in (kind, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(name).type
    except pa.ArrowException as error:
        fix = "write the column with one type in all files"
        raise DataError(f"{file}, column {name!r}", expected=str(kind), received=str(other), fix=fix) from error


@dataclass(frozen=True)
class KeyTable:
    """The row keys of a side, in the order of its rows.

    Raises:
        DataError: a key occurs twice.
    """

    place: str
    """For messages."""
    names: Sequence[str]
    columns: Sequence[pa.ChunkedArray]

    def __post_init__(self) -> None:
        frame = pl.DataFrame([pl.Series(str(place), pl.from_arrow(column)) for place, column in enumerate(self.columns)]).drop_nulls()
        twice = frame.filter(frame.is_duplicated())
        if len(twice):
            received = f"{_named(self.names, twice)} 2 times or more"
            fix = "name columns that tell rows apart, or remove the repeated rows"
            raise DataError(f"{self.place}, row key {list(self.names)}", expected="each once", received=received, fix=fix)


def read_keys(log: ParquetLog, names: Sequence[str]) -> KeyTable:
    """
    Raises:
        DataError: the log lacks a column of the key, or a key occurs twice.
    """
    log.check_columns(names, "a column of the row key")
    return KeyTable(f"{log.place} {log.path}", names, log.read(names).columns)


def common_rows(first: KeyTable, second: KeyTable) -> tuple[Ints, Ints]:
    """Places of the rows that both sides have, in the order of the first. Rows without a key are passed over.

    Integers are compared as numbers, anything else as text.

    Raises:
        DataError: no row is on both.
    """
    pairs = [comparable_ids(*pair) for pair in zip(first.columns, second.columns, strict=True)]
    frames = [
        pl.DataFrame({str(place): pair[side] for place, pair in enumerate(pairs)}).with_row_index(_ROW).drop_nulls() for side in (0, 1)
    ]
    keys = [str(place) for place in range(len(pairs))]
    common = frames[0].join(frames[1], on=keys, how="inner", suffix="_second").sort(_ROW)
    if not len(common):
        examples = [_named(table.names, frame.select(keys)) for table, frame in zip((first, second), frames, strict=True)]
        fix = "name logs of the same time, and the columns that hold the same key (NAME=NAME where they differ in name)"
        received = f"none; such as {' and '.join(examples)}"
        raise DataError(f"{first.place} and {second.place}", expected="rows with the same key", received=received, fix=fix)
    return common[_ROW].to_numpy().astype(np.int64), common[f"{_ROW}_second"].to_numpy().astype(np.int64)


def _named(names: Sequence[str], keys: pl.DataFrame) -> str:
    """The first of some keys, for a message."""
    return ", ".join(f"{name} {value}" for name, value in zip(names, keys.row(0), strict=True)) if len(keys) else "no key at all"
