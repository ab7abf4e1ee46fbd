"""Keeps the rows for which an expression is true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa

from mlenv.datasets.transforms.expressions import columns_of, evaluate, parse, require_boolean
from mlenv.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Drops rows for which ``where`` is false or null."""

    where: str
    """SQL expression over the columns of a row, true or false."""
    when: Literal["always", "train"] = "always"
    """train leaves held-out rows alone."""

    drops_rows: ClassVar[bool] = True
    sampling_seed: ClassVar[int | None] = None
    writes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        parse(self.where, "where")
        if not columns_of(self.where):
            raise ConfigError("where", expected="an expression that reads a column", received=self.where)

    @property
    def reads(self) -> tuple[str, ...]:
        return columns_of(self.where)

    def held_out(self) -> FilterConfig | None:
        return self if self.when == "always" else None

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        require_boolean(self.where, columns, "where")
        return columns

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        return rows.filter(evaluate(self.where, rows, "where"))
