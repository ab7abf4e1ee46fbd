"""Changes the values of one column, row by row: hashing, bucketing, clipping, truncating."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlenv.datasets.hashing import hash_ids
from mlenv.datasets.transforms.expressions import as_array, require_columns, with_column, with_field
from mlenv.errors import ConfigError, check_at_least


@dataclass(frozen=True, kw_only=True)
class HashConfig:
    """Integers or texts to integers in [0, ``num_buckets``), by the hash of embedding tables; null stays null."""

    column: str
    """Column to read."""
    num_buckets: int
    """Values that can come out."""
    into: str = ""
    """Column to write; ``column`` itself when empty."""

    drops_rows: ClassVar[bool] = False
    sampling_seed: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        check_at_least("num_buckets", self.num_buckets, 1)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.into or self.column,)

    def held_out(self) -> HashConfig:
        return self

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        require_columns(self.reads, columns, "column")
        kind = columns.field(self.column).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_integer(plain) or pa.types.is_string(plain) or pa.types.is_large_string(plain)):
            raise ConfigError("column", expected="a column of integers or texts", received=f"{self.column}, which is {kind}")
        return with_field(columns, self.into or self.column, pa.int64())

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        ids = rows.column(self.column)
        known = ids.is_valid().to_numpy(zero_copy_only=False)
        buckets = np.zeros(len(ids), np.int64)
        buckets[known] = (hash_ids(ids.drop_null() if ids.null_count else ids) % np.uint64(self.num_buckets)).view(np.int64)
        return with_column(rows, self.into or self.column, pa.array(buckets, mask=None if known.all() else ~known))


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """A number to how many boundaries are not above it, an integer in [0, ``len(boundaries)``]; null and NaN become null."""

    column: str
    """Column to read."""
    boundaries: tuple[float, ...]
    """In rising order."""
    into: str = ""
    """Column to write; ``column`` itself when empty."""

    drops_rows: ClassVar[bool] = False
    sampling_seed: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if not self.boundaries or any(not low < high for low, high in pairwise(self.boundaries)):
            raise ConfigError("boundaries", expected="numbers in rising order", received=list(self.boundaries))

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.into or self.column,)

    def held_out(self) -> BucketConfig:
        return self

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        _require_number(self.column, columns)
        return with_field(columns, self.into or self.column, pa.int64())

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        numbers = rows.column(self.column).cast(pa.float64()).to_numpy(zero_copy_only=False)
        missing = np.isnan(numbers)
        buckets = np.searchsorted(np.array(self.boundaries), numbers, side="right")
        return with_column(rows, self.into or self.column, pa.array(buckets.astype(np.int64), mask=missing if missing.any() else None))


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Numbers outside the bounds become the nearer bound; null and NaN stay. The column keeps its type."""

    column: str
    """Column to change."""
    lower: float | None = None
    """Smallest value that stays."""
    upper: float | None = None
    """Largest value that stays."""

    drops_rows: ClassVar[bool] = False
    sampling_seed: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if self.lower is None and self.upper is None:
            raise ConfigError("lower", expected="a bound, here or in upper", received=None)
        if self.lower is not None and self.upper is not None and not self.lower <= self.upper:
            raise ConfigError("lower", expected=f"a number not above upper, {self.upper}", received=self.lower)
        for name in ("lower", "upper"):
            if (bound := getattr(self, name)) is not None and not math.isfinite(bound):
                raise ConfigError(name, expected="a finite number", received=bound)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.column,)

    def held_out(self) -> ClipConfig:
        return self

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        _require_number(self.column, columns)
        kind = columns.field(self.column).type
        for name in ("lower", "upper"):
            bound = getattr(self, name)
            try:
                pa.array([bound]).cast(kind)
            except pa.ArrowInvalid as error:
                raise ConfigError(name, expected=f"a number that {kind}, the type of {self.column}, can hold", received=bound) from error
        return columns

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        import polars as pl

        numbers = rows.column(self.column)
        series = pl.from_arrow(numbers)
        assert isinstance(series, pl.Series)
        return with_column(rows, self.column, as_array(series.clip(self.lower, self.upper)).cast(numbers.type))


@dataclass(frozen=True, kw_only=True)
class TruncateConfig:
    """Keeps one end of the lists of some columns, such as the aligned lists of a sequence; null stays null."""

    columns: tuple[str, ...]
    """Columns of lists to change."""
    max_length: int
    """Elements that stay, at most."""
    keep: Literal["last", "first"] = "last"
    """Which end stays."""

    drops_rows: ClassVar[bool] = False
    sampling_seed: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        check_at_least("max_length", self.max_length, 1)
        if not self.columns:
            raise ConfigError("columns", expected="at least one column", received=[])

    @property
    def reads(self) -> tuple[str, ...]:
        return self.columns

    @property
    def writes(self) -> tuple[str, ...]:
        return self.columns

    def held_out(self) -> TruncateConfig:
        return self

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        require_columns(self.columns, columns, "columns")
        for name in self.columns:
            kind = columns.field(name).type
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
                raise ConfigError("columns", expected="columns of lists", received=f"{name}, which is {kind}")
        return columns

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        import polars as pl

        for name in self.columns:
            lists = rows.column(name)
            if (pc.max(pc.list_value_length(lists)).as_py() or 0) <= self.max_length:
                continue
            series = pl.from_arrow(lists)
            assert isinstance(series, pl.Series)
            cut = series.list.tail(self.max_length) if self.keep == "last" else series.list.head(self.max_length)
            rows = with_column(rows, name, as_array(cut).cast(lists.type))
        return rows


def _require_number(column: str, columns: pa.Schema) -> None:
    require_columns((column,), columns, "column")
    kind = columns.field(column).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ConfigError("column", expected="a column of numbers", received=f"{column}, which is {kind}")
