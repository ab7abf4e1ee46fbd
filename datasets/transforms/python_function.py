"""A team's own function over columns."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from mlenv.datasets.transforms.expressions import require_columns, with_column, with_field
from mlenv.errors import ConfigError, DataError

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class PythonConfig:
    """Calls ``function(rows)`` with the columns ``reads`` as a RecordBatch and takes the columns ``writes`` from the RecordBatch
    that it gives back: the same rows in the same order. To drop rows it writes a column that a filter reads.

    It is called in several threads, once with no rows to learn its types, and must give each row the same whatever its company.
    """

    function: str
    """Import path, ``package.module:function``."""
    reads: tuple[str, ...]
    """Columns that it gets."""
    writes: tuple[str, ...]
    """Columns that it gives, new or in place of others."""

    drops_rows: ClassVar[bool] = False
    sampling_seed: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if not _PATH.fullmatch(self.function):
            raise ConfigError("function", expected="an import path 'package.module:function'", received=self.function)
        if not self.writes:
            raise ConfigError("writes", expected="at least one column", received=[])
        self._function()

    def held_out(self) -> PythonConfig:
        return self

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        require_columns(self.reads, columns, "reads")
        given = self._call(pa.RecordBatch.from_pylist([], schema=pa.schema([columns.field(name) for name in self.reads])))
        for name in self.writes:
            columns = with_field(columns, name, given.schema.field(name).type)
        return columns

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        given = self._call(rows.select(list(self.reads)))
        for name in self.writes:
            rows = with_column(rows, name, given.column(name))
        return rows

    def _call(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        try:
            given = self._function()(rows)
        except Exception as error:  # the function is the team's own: whatever it raises is named
            received = f"{type(error).__name__}: {error}"
            raise DataError("function", expected=f"{self.function} to take {rows.num_rows} rows", received=received) from error
        if not isinstance(given, pa.RecordBatch) or given.num_rows != rows.num_rows or set(self.writes) - set(given.schema.names):
            expected = f"{self.function} to give a RecordBatch of {rows.num_rows} rows with the columns {list(self.writes)}"
            received = f"{given.num_rows} rows of {given.schema.names}" if isinstance(given, pa.RecordBatch) else type(given).__name__
            raise DataError("function", expected=expected, received=received)
        return given

    def _function(self) -> Callable[[pa.RecordBatch], Any]:
        module, name = self.function.split(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            fix = f"{error}; run from the root of your repo or install it"
            raise ConfigError("function", expected="an importable function", received=self.function, fix=fix) from error
        if not callable(found):
            raise ConfigError("function", expected="a function", received=self.function)
        return found  # type: ignore[no-any-return]
