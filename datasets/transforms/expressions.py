"""SQL expressions over the columns of a row, evaluated by Polars on Arrow's memory."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mlenv.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    import polars as pl

_PROBE = "__probe__"
_CLOCK = re.compile(r"\b(now\s*\(|current_(date|time|timestamp)\b)", re.IGNORECASE)


@lru_cache(maxsize=256)
def parse(sql: str, key: str = "") -> pl.Expr:
    """
    Raises:
        ConfigError: it is no SQL expression, or its value is another tomorrow.
    """
    import polars as pl
    from polars.exceptions import PolarsError

    try:
        expression = pl.sql_expr(sql)
    except PolarsError as error:
        raise ConfigError(key, expected="an SQL expression", received=sql, fix=_first_line(error)) from error
    if _CLOCK.search(re.sub(r"'[^']*'", "", sql)):
        raise ConfigError(key, expected="an expression that gives the same tomorrow", received=sql, fix="write the day as a text")
    return expression


def columns_of(sql: str) -> tuple[str, ...]:
    """Columns that an expression reads, each once."""
    return tuple(dict.fromkeys(parse(sql).meta.root_names()))


def require_columns(names: tuple[str, ...], columns: pa.Schema, key: str) -> None:
    """
    Raises:
        ConfigError: a name is no column.
    """
    for name in names:
        if name not in columns.names:
            raise ConfigError(key, expected="columns of the data", received=name, fix=nearest(name, columns.names))


def type_of(sql: str, columns: pa.Schema, key: str) -> pa.DataType:
    """Type of the value of an expression.

    Raises:
        ConfigError: a column is not there, the types do not go together, or the value of a row hangs on other rows, so that
            it would depend on how the rows are cut into files.
    """
    import polars as pl
    from polars.exceptions import PolarsError

    expression = parse(sql)
    require_columns(columns_of(sql), columns, key)
    try:
        frame = _frame(pa.schema([columns.field(name) for name in columns_of(sql)]).empty_table()).with_columns(pl.lit(True).alias(_PROBE))
        value = frame.with_columns(expression.alias("value")).get_column("value").to_arrow()
        # Polars filters before it computes only where a row's value is its own.
        plan = frame.lazy().with_columns(expression.alias("value")).filter(pl.col(_PROBE)).explain()
    except PolarsError as error:
        raise ConfigError(key, expected="an expression of matching types", received=sql, fix=_first_line(error)) from error
    if not plan.lstrip().startswith("WITH_COLUMNS"):
        fix = "an aggregate over other rows belongs into the data"
        raise ConfigError(key, expected="an expression over one row", received=sql, fix=fix)
    return value.type


def require_boolean(sql: str, columns: pa.Schema, key: str) -> None:
    """
    Raises:
        ConfigError: as ``type_of``, or the expression is neither true nor false.
    """
    if not pa.types.is_boolean(found := type_of(sql, columns, key)):
        raise ConfigError(
            key, expected="an expression that is true or false", received=f"{sql}, which is {found}", fix="compare it: ... = 1"
        )


def evaluate(sql: str, rows: pa.RecordBatch, key: str) -> pa.Array:
    """Values of an expression, ``(rows,)``.

    Raises:
        DataError: it cannot be computed on these rows, such as a cast of a text that is no number.
    """
    from polars.exceptions import PolarsError

    expression, names = parse(sql), columns_of(sql)
    try:
        if not names:
            return pa.repeat(_constant(expression), rows.num_rows)
        value = _frame(rows.select(list(names))).with_columns(expression.alias(_PROBE)).get_column(_PROBE)
    except PolarsError as error:
        expected = f"rows on which {sql!r} can be computed"
        raise DataError(
            key, expected=expected, received=_first_line(error), fix="guard it, for example with TRY_CAST or CASE WHEN"
        ) from error
    return as_array(value)


def as_array(series: pl.Series) -> pa.Array:
    """A series as Arrow; Polars keeps marks of its own in the type of a dictionary, which are dropped."""
    values = series.to_arrow()
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def with_column(rows: pa.RecordBatch, name: str, values: pa.Array) -> pa.RecordBatch:
    """Rows with a column that is new, or takes the place of the one of that name."""
    place = rows.schema.get_field_index(name)
    return rows.append_column(name, values) if place < 0 else rows.set_column(place, name, values)


def with_field(columns: pa.Schema, name: str, kind: pa.DataType) -> pa.Schema:
    """The same for the columns alone."""
    place = columns.get_field_index(name)
    field = pa.field(name, kind)
    return columns.append(field) if place < 0 else columns.set(place, field)


def _constant(expression: pl.Expr) -> pa.Scalar:
    import polars as pl

    return as_array(pl.select(expression).to_series())[0]


def _frame(rows: Any) -> pl.DataFrame:
    import polars as pl

    frame = pl.from_arrow(rows, rechunk=False)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
