"""How far two columns that should hold the same do: one pass, mergeable, the same however the rows are cut into batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlenv.datasets.hashing import as_int64
from mlenv.datasets.lists import as_list, list_lengths
from mlenv.errors import ConfigError

Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class Moments:
    """Of pairs of finite numbers.

    Source: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", The American Statistician, 1983.
    """

    count: int = 0
    means: tuple[float, float] = (0.0, 0.0)
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Sums over the pairs of the squared distances from both means, and of their product."""

    @classmethod
    def of(cls, first: NDArray[np.float64], second: NDArray[np.float64]) -> Moments:
        """``first``, ``second``: ``(n,)``."""
        if not len(first):
            return cls()
        means = float(first.mean()), float(second.mean())
        one, other = first - means[0], second - means[1]
        return cls(len(first), means, (float(one @ one), float(other @ other), float(one @ other)))

    def merged(self, other: Moments) -> Moments:
        """The pairs of both parts together."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        gaps = other.means[0] - self.means[0], other.means[1] - self.means[1]
        products = gaps[0] ** 2, gaps[1] ** 2, gaps[0] * gaps[1]
        squares = tuple(
            mine + theirs + product * self.count * share
            for mine, theirs, product in zip(self.squares, other.squares, products, strict=True)
        )
        return Moments(count, (self.means[0] + gaps[0] * share, self.means[1] + gaps[1] * share), (squares[0], squares[1], squares[2]))

    @property
    def correlation(self) -> float:
        """Pearson's; nan where one side is constant."""
        spread = math.sqrt(self.squares[0] * self.squares[1])
        return self.squares[2] / spread if spread else math.nan


@dataclass(frozen=True)
class Agreement:
    """Two columns beside each other. A list that is empty is there; a null is not."""

    rows: int = 0
    first: int = 0
    """Rows in which the first column is there."""
    second: int = 0
    both: dict[str, int] = field(default_factory=dict)
    """By day, rows in which both are there; the day is empty where none is known."""
    differing: dict[str, int] = field(default_factory=dict)
    """Those of them in which they differ."""
    moments: Moments = Moments()
    """Of the rows with two finite numbers; none where the columns hold something else."""

    @classmethod
    def of(cls, first: pa.Array, second: pa.Array, days: pa.Array | None, tolerance: float) -> Agreement:
        """
        Args:
            days: the day of each row as text.
            tolerance: difference relative to the larger one up to which two numbers agree; two integers only when equal.
        """
        there, also = _valid(first), _valid(second)
        both = pa.array(np.flatnonzero(there & also))
        first, second = first.take(both), second.take(both)
        differ = _values_differ(first, second, tolerance)
        day = pa.repeat("", len(both)) if days is None else days.take(both).fill_null("")
        table = pa.table({"day": day, "differ": pa.array(differ.astype(np.int64))}).group_by("day")
        by_day = table.aggregate([([], "count_all"), ("differ", "sum")]).to_pylist()
        moments = Moments()
        if _is_number(first.type) and _is_number(second.type):
            numbers, others = _floats(first), _floats(second)
            finite = np.isfinite(numbers) & np.isfinite(others)
            moments = Moments.of(numbers[finite], others[finite])
        return cls(
            rows=len(there),
            first=int(there.sum()),
            second=int(also.sum()),
            both={row["day"]: row["count_all"] for row in by_day},
            differing={row["day"]: row["differ_sum"] for row in by_day},
            moments=moments,
        )

    def merged(self, other: Agreement) -> Agreement:
        """Both parts together."""
        return Agreement(
            self.rows + other.rows,
            self.first + other.first,
            self.second + other.second,
            _added(self.both, other.both),
            _added(self.differing, other.differing),
            self.moments.merged(other.moments),
        )

    @property
    def num_both(self) -> int:
        """Rows in which both are there."""
        return sum(self.both.values())

    @property
    def differing_share(self) -> float:
        """Share of the rows with both in which they differ; nan without any."""
        return sum(self.differing.values()) / self.num_both if self.num_both else math.nan

    @property
    def worst_day(self) -> tuple[str, float]:
        """The day with the largest share, and the share; there is at least one row with both."""
        shares = {day: self.differing[day] / count for day, count in self.both.items()}
        return max(sorted(shares.items()), key=lambda entry: entry[1])


def measure_agreement(
    batches: Iterable[tuple[pa.RecordBatch, pa.Array | None]], pairs: Mapping[str, str], tolerance: float
) -> dict[str, Agreement]:
    """Reads the batches once, each with the days of its rows.

    Args:
        pairs: names of columns, and of those that should hold the same.

    Returns:
        By the first column of each pair.

    Raises:
        ConfigError: the columns of a pair are of kinds that cannot be compared.
    """
    found = dict.fromkeys(pairs, Agreement())
    for batch, days in batches:
        for first, second in pairs.items():
            check_comparable(batch.schema.field(first), batch.schema.field(second))
            found[first] = found[first].merged(Agreement.of(batch.column(first), batch.column(second), days, tolerance))
    return found


def check_comparable(first: pa.Field, second: pa.Field) -> None:
    """
    Raises:
        ConfigError: two columns are of kinds that cannot be compared.
    """
    if _kind(first.type) != _kind(second.type):
        received = f"{second.name}, which is {second.type}, beside {first.type}"
        raise ConfigError(first.name, expected="a column of the same kind", received=received, fix="derive a column of that kind")


def _kind(kind: pa.DataType) -> Any:
    """Equal for types whose values can be compared."""
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if pa.types.is_map(kind):
        return ["list", ["struct", _kind(kind.key_type), _kind(kind.item_type)]]
    if _is_list(kind):
        return ["list", _kind(kind.value_type)]
    if pa.types.is_struct(kind):
        return ["struct", *(_kind(part.type) for part in kind)]
    if _is_number(kind) or pa.types.is_boolean(kind):
        return "number"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    return str(kind)


def _differ(first: pa.Array, second: pa.Array, tolerance: float) -> Booleans:
    """``(n,)``; nulls agree with nulls alone."""
    there, also = _valid(first), _valid(second)
    differ: Booleans = there != also
    both = np.flatnonzero(there & also)
    differ[both] = _values_differ(first.take(pa.array(both)), second.take(pa.array(both)), tolerance)
    return differ


def _values_differ(first: pa.Array, second: pa.Array, tolerance: float) -> Booleans:
    """``(n,)``, of columns without nulls."""
    kind, other = first.type, second.type
    if pa.types.is_map(kind) or _is_list(kind):
        return _lists_differ(as_list(first), as_list(second), tolerance)
    if pa.types.is_struct(kind):
        parts = zip(first.flatten(), second.flatten(), strict=True)
        either: Booleans = np.logical_or.reduce([_differ(one, another, tolerance) for one, another in parts])
        return either
    if pa.types.is_integer(kind) and pa.types.is_integer(other):
        different: Booleans = as_int64(first) != as_int64(second)
        return different
    if _kind(kind) == "number":
        numbers, others = _floats(first), _floats(second)
        agree: Booleans = (numbers == others) | (np.isnan(numbers) & np.isnan(others))
        finite = np.isfinite(numbers) & np.isfinite(others)
        larger = np.maximum(np.abs(numbers[finite]), np.abs(others[finite]))
        agree[finite] |= np.abs(numbers[finite] - others[finite]) <= tolerance * larger
        return ~agree
    texts = (one.cast(pa.large_string()) for one in (first, second))
    unequal: Booleans = pc.not_equal(*texts).to_numpy(zero_copy_only=False)
    return unequal


def _lists_differ(first: pa.Array, second: pa.Array, tolerance: float) -> Booleans:
    lengths = list_lengths(first)
    differ: Booleans = lengths != list_lengths(second)
    alike = np.flatnonzero(~differ)
    one, other = (lists.take(pa.array(alike)).flatten() for lists in (first, second))
    row_of = np.repeat(alike, lengths[alike])
    differ[row_of[_differ(one, other, tolerance)]] = True
    return differ


def _floats(column: pa.Array) -> NDArray[np.float64]:
    floats: NDArray[np.float64] = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return floats


def _valid(column: pa.Array) -> Booleans:
    valid: Booleans = column.is_valid().to_numpy(zero_copy_only=False)
    return valid


def _is_number(kind: pa.DataType) -> bool:
    return any(is_type(kind) for is_type in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal))


def _is_list(kind: pa.DataType) -> bool:
    return any(is_type(kind) for is_type in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _added(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {day: first.get(day, 0) + second.get(day, 0) for day in sorted(first.keys() | second.keys())}
