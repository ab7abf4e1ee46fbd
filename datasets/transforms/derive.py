"""Makes a column of others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from mlenv.datasets.transforms.expressions import columns_of, evaluate, parse, type_of, with_column, with_field
from mlenv.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DeriveConfig:
    """Writes the value of an expression into a column, new or in place of another: a feature, a label, a mask, a weight."""

    column: str
    """Column to write."""
    sql: str
    """SQL expression over the columns of a row."""

    drops_rows: ClassVar[bool] = False
    sampling_seed: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if not self.column:
            raise ConfigError("column", expected="a name", received=self.column)
        parse(self.sql, "sql")

    @property
    def reads(self) -> tuple[str, ...]:
        return columns_of(self.sql)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.column,)

    def held_out(self) -> DeriveConfig:
        return self

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        return with_field(columns, self.column, type_of(self.sql, columns, "sql"))

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        return with_column(rows, self.column, evaluate(self.sql, rows, "sql"))
