"""Keys by which rows find those of a table that lies beside the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlenv.datasets.hashing import hash_rows
from mlenv.datasets.side_table import key_kind
from mlenv.datasets.transforms.expressions import require_columns
from mlenv.errors import ConfigError


def hash_keys(columns: Sequence[pa.Array]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Hashes of the keys, and which of them have no null."""
    known = np.ones(len(columns[0]), bool)
    for column in columns:
        if column.null_count:
            known &= column.is_valid().to_numpy(zero_copy_only=False)
    return hash_rows(columns), known


def check_keys(key: tuple[str, ...], columns: pa.Schema, table_key: tuple[str, ...], table: pa.Schema) -> None:
    """
    Raises:
        ConfigError: a column of the key is not in the data, is no key, or has another type than that of the table.
    """
    require_columns(key, columns, "key")
    for name, other in zip(key, table_key, strict=True):
        mine, theirs = columns.field(name).type, table.field(other).type
        if not key_kind(theirs) or not key_kind(mine):
            received = f"{name}, which is {mine}, and {other} of the table, which is {theirs}"
            raise ConfigError("key", expected="columns of integers, texts, booleans or times", received=received)
        if key_kind(mine) != key_kind(theirs):
            into = "BIGINT" if key_kind(theirs) == "integer" else "VARCHAR"
            fix = f"write them with one type, or derive a key before the join: CAST({name} AS {into})"
            expected = f"a key of the type that the table has, {other}: {theirs}"
            raise ConfigError("key", expected=expected, received=f"{name}: {mine}", fix=fix)


def check_table_key(key: tuple[str, ...], table_key: tuple[str, ...]) -> None:
    """
    Raises:
        ConfigError: there is no key, or the table names another number of columns.
    """
    if not key:
        raise ConfigError("key", expected="at least one column", received=key)
    if table_key and len(table_key) != len(key):
        raise ConfigError("table_key", expected=f"{len(key)} columns, as many as key", received=list(table_key))


def check_new(names: Sequence[str], columns: pa.Schema, replaced: tuple[str, ...], key: str, rename: str) -> None:
    """
    Raises:
        ConfigError: a column that is added is there already and may not be replaced, or one to be replaced is not there.
    """
    for name in (name for name in names if name in columns.names and name not in replaced):
        fix = f"give it another name, {rename.format(name)}, or name it in replace"
        raise ConfigError(key, expected="columns that the data do not have", received=name, fix=fix)
    require_columns(replaced, columns, "replace")


def as_text(key: Mapping[str, object]) -> str:
    """A key in a message."""
    return ", ".join(f"{name} {value!r}" for name, value in key.items())
