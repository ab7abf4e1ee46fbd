"""Keeps a share of the rows. A row's fate is a hash of its key: the same on any number of workers and after a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from mlenv.datasets.hashing import hash_rows, splitmix64
from mlenv.datasets.transforms.expressions import (
    columns_of,
    evaluate,
    parse,
    require_boolean,
    require_columns,
    with_column,
    with_field,
)
from mlenv.errors import ConfigError


def draw(rows: pa.RecordBatch, row_key: tuple[str, ...], name: str, seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each row, uniform over row keys, that hangs on the key, the name of the draw and the seed alone."""
    salt = np.uint64(xxhash.xxh64_intdigest(f"{name} {seed}".encode()))
    mixed = splitmix64(hash_rows([rows.column(column) for column in row_key]) ^ salt)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, kw_only=True)
class SampleNegativesConfig:
    """Keeps all positives and a share of the negatives.

    The predictions of a model that is trained on what stays are too high. Either ``weight_column`` tells the loss how many
    rows each kept one stands for, or ``calibration.TASK`` of kind ``negative_sampling`` corrects the predictions; never both.
    """

    negative: str
    """SQL expression, true for a negative; where it is false or null the row stays."""
    rate: float
    """Share of the negatives that stays, in (0, 1]."""
    weight_column: str = ""
    """Column to write: 1 / ``rate`` for a negative, 1 for a positive; empty writes none."""
    base_weight: str = ""
    """Column of weights that are multiplied into ``weight_column``."""
    seed: int = 0
    """Another seed keeps other rows."""
    when: Literal["always", "train"] = "train"
    """train keeps all held-out rows, with the weight 1: a sampled test window would falsify the metrics."""

    drops_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_rate("rate", self.rate)
        check_weights(self.weight_column, self.base_weight)
        parse(self.negative, "negative")

    @property
    def sampling_seed(self) -> int:
        return self.seed

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*columns_of(self.negative), *named(self.base_weight))))

    @property
    def writes(self) -> tuple[str, ...]:
        return named(self.weight_column)

    def held_out(self) -> SampleNegativesConfig | None:
        if self.when == "always":
            return self
        return replace(self, rate=1.0) if self.weight_column else None

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        require_boolean(self.negative, columns, "negative")
        return weighted_schema(columns, self.weight_column, self.base_weight)

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        negative = pc.fill_null(evaluate(self.negative, rows, "negative"), False).to_numpy(zero_copy_only=False)
        return sampled(rows, np.where(negative, self.rate, 1.0), row_key, self)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Keeps a share of the rows, by the values of a column where one is named."""

    column: str = ""
    """Column whose values have rates of their own; empty treats all rows alike."""
    rates: dict[str, float] = field(default_factory=dict)
    """Share that stays of the rows with a value of ``column``, written as text, in [0, 1]."""
    default_rate: float = 1.0
    """Share that stays of all others, nulls too."""
    weight_column: str = ""
    """Column to write: 1 / rate of the row; empty writes none."""
    base_weight: str = ""
    """Column of weights that are multiplied into ``weight_column``."""
    seed: int = 0
    """Another seed keeps other rows."""
    when: Literal["always", "train"] = "train"
    """train keeps all held-out rows, with the weight 1."""

    drops_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for value, rate in (self.rates | {"": self.default_rate}).items():
            if not 0 <= rate <= 1:
                raise ConfigError(f"rates.{value}" if value else "default_rate", expected="a number in [0, 1]", received=rate)
        if self.rates and not self.column:
            raise ConfigError("column", expected="the column whose values have rates", received="")
        check_weights(self.weight_column, self.base_weight)

    @property
    def sampling_seed(self) -> int:
        return self.seed

    @property
    def reads(self) -> tuple[str, ...]:
        return (*named(self.column), *named(self.base_weight))

    @property
    def writes(self) -> tuple[str, ...]:
        return named(self.weight_column)

    def held_out(self) -> SampleConfig | None:
        if self.when == "always":
            return self
        return replace(self, rates={}, default_rate=1.0) if self.weight_column else None

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        require_columns(named(self.column), columns, "column")
        if self.column and pa.types.is_nested(kind := columns.field(self.column).type):
            raise ConfigError("column", expected="a column of plain values", received=f"{self.column}, which is {kind}")
        return weighted_schema(columns, self.weight_column, self.base_weight)

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        if not self.rates:
            return sampled(rows, np.full(rows.num_rows, self.default_rate), row_key, self)
        return sampled(rows, _by_value(rows.column(self.column), self.rates, self.default_rate), row_key, self)


def _by_value(column: pa.Array, rates: Mapping[str, float], default: float) -> NDArray[np.float64]:
    """The rate of each row; Python sees each distinct value once."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    by_code = [rates.get(str(value), default) for value in encoded.dictionary.cast(pa.string()).to_pylist()]
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), len(by_code)).to_numpy()
    by_row: NDArray[np.float64] = np.array([*by_code, default], np.float64)[codes]
    return by_row


class Sampler(Protocol):
    """What a sampler says of its draw and of the weights that it writes."""

    @property
    def seed(self) -> int: ...
    @property
    def weight_column(self) -> str: ...
    @property
    def base_weight(self) -> str: ...


def sampled(rows: pa.RecordBatch, rates: NDArray[np.float64], row_key: tuple[str, ...], config: Sampler) -> pa.RecordBatch:
    """The rows that stay, with their weight; ``rates``: ``(rows,)``, the share that stays of rows like each."""
    kept = rates >= 1
    if not kept.all():
        kept |= draw(rows, row_key, type(config).__name__, config.seed) < rates
        rows, rates = rows.filter(pa.array(kept)), rates[kept]
    if not config.weight_column:
        return rows
    weights: pa.Array = pa.array(1 / rates)
    if config.base_weight:
        weights = pc.multiply(weights, rows.column(config.base_weight).cast(pa.float64()))
    return with_column(rows, config.weight_column, weights)


def weighted_schema(columns: pa.Schema, weight_column: str, base_weight: str) -> pa.Schema:
    """
    Raises:
        ConfigError: ``base_weight`` is no column.
    """
    require_columns(named(base_weight), columns, "base_weight")
    return with_field(columns, weight_column, pa.float64()) if weight_column else columns


def _check_rate(key: str, rate: float) -> None:
    if not 0 < rate <= 1:
        raise ConfigError(key, expected="a number in (0, 1]", received=rate)


def check_weights(weight_column: str, base_weight: str) -> None:
    """
    Raises:
        ConfigError: weights are multiplied into a column that is not written.
    """
    if base_weight and not weight_column:
        raise ConfigError("weight_column", expected="a column to write, because base_weight is set", received="")


def named(column: str) -> tuple[str, ...]:
    """A column that may be left out."""
    return (column,) if column else ()
