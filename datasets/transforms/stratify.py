"""Keeps as many rows as possible so that values make up wanted shares, or are no more than so many: the rates follow from the window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlenv.config import Findings
from mlenv.datasets.transforms.expressions import require_columns
from mlenv.datasets.transforms.sampling import SampleConfig, check_weights, named, sampled, weighted_schema
from mlenv.errors import ConfigError, DataError, check_at_least, nearest

Rates = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StratifyConfig:
    """Samples each value of a column at a rate of its own, so that the values come out in wanted shares or numbers.

    The columns are counted over the whole window before the training. Which rows stay hangs on their key, so the shares come
    out up to the chance of a sample.
    """

    columns: tuple[str, ...]
    """Columns whose values are balanced; of several, such as a surface and a label, each combination is a value: ``feed/1``."""
    shares: dict[str, float] = field(default_factory=dict)
    """Wanted share of each value, written as text, null as ``null``. Values that are not named share what is left to 1."""
    max_rows_per_value: int = 0
    """Instead of shares: about as many rows stay of each value and day, all where there are fewer."""
    day_column: str = "date"
    """Column of the day for ``max_rows_per_value``; empty counts over the whole window."""
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
        if not self.columns:
            raise ConfigError("columns", expected="at least one column", received=[])
        check_at_least("max_rows_per_value", self.max_rows_per_value, 0)
        if bool(self.shares) == bool(self.max_rows_per_value):
            received = "both" if self.shares else "neither"
            raise ConfigError("shares", expected="either shares or max_rows_per_value", received=received)
        for value, share in self.shares.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"shares.{value}", expected="a number in [0, 1]", received=share)
        if (total := math.fsum(self.shares.values())) > 1 + 1e-9 or (self.shares and not total):
            raise ConfigError("shares", expected="shares that add up to at most 1, and not to 0", received=total)
        check_weights(self.weight_column, self.base_weight)

    @property
    def sampling_seed(self) -> int:
        return self.seed

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._strata, *named(self.base_weight))))

    @property
    def writes(self) -> tuple[str, ...]:
        return named(self.weight_column)

    def held_out(self) -> StratifyConfig | SampleConfig | None:
        if self.when == "always":
            return self
        return SampleConfig(weight_column=self.weight_column, base_weight=self.base_weight) if self.weight_column else None

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        require_columns(self.columns, columns, "columns")
        require_columns(self._strata, columns, "day_column")
        for name in self._strata:
            if pa.types.is_nested(kind := columns.field(name).type):
                raise ConfigError("columns", expected="columns of plain values", received=f"{name}, which is {kind}")
        return weighted_schema(columns, self.weight_column, self.base_weight)

    def survey(self, rows: pa.RecordBatch) -> pa.Table:
        """Rows of a row group by value."""
        return pa.table({"value": self._values(rows)}).group_by("value").aggregate([([], "count_all")])

    def conclude(self, surveys: Sequence[pa.Table]) -> Findings:
        """
        Raises:
            DataError: no row has a value that is to have a share.
        """
        table = pa.concat_tables(surveys).group_by("value").aggregate([("count_all", "sum")]).sort_by("value")
        values, counts = table["value"].combine_chunks(), table["count_all_sum"].to_numpy()
        rates = self._rates_of_shares(values.to_pylist(), counts) if self.shares else np.minimum(self.max_rows_per_value / counts, 1.0)
        expected = rates * counts
        notes = [f"keeps about {expected.sum():.0f} of {counts.sum()} rows"]
        if self.shares:
            each = zip(values.to_pylist(), rates, counts.tolist(), strict=True)
            notes += [
                f"{'/'.join(self.columns)}={value}: {rate:.6g} of {count} rows" for value, rate, count in each if value in self.shares
            ]
        else:
            notes.append(f"samples {int((rates < 1).sum())} of {len(rates)} values{' and days' if self.day_column else ''}")
        return Findings(apply=partial(self._apply, values, rates), notes=tuple(notes))

    @property
    def _strata(self) -> tuple[str, ...]:
        return (*self.columns, *named(self.day_column if self.max_rows_per_value else ""))

    def _values(self, rows: pa.RecordBatch) -> pa.Array:
        texts = [rows.column(name).cast(pa.string()).fill_null("null") for name in self._strata]
        return pc.binary_join_element_wise(*texts, "/")

    def _rates_of_shares(self, values: list[str], counts: NDArray[np.int64]) -> Rates:
        """The largest rates that give the shares: the scarcest value stays whole."""
        for value, share in self.shares.items():
            if share and value not in values:
                place = f"shares.{value}"
                raise DataError(
                    place, expected=f"rows with this value of {'/'.join(self.columns)}", received="none", fix=nearest(value, values)
                )
        is_named = np.array([value in self.shares for value in values])
        rest = max(1 - math.fsum(self.shares.values()), 0.0)
        rest = 0.0 if rest < 1e-9 else rest
        if rest and is_named.all():
            raise DataError("shares", expected="shares that add up to 1, because no row has another value", received=1 - rest)
        shares = np.array([self.shares.get(value, rest) for value in values])
        sizes = np.where(is_named, counts, counts[~is_named].sum())  # values that are not named have one rate
        room = np.divide(sizes, shares, out=np.full(len(values), np.inf), where=shares > 0)
        rates: Rates = np.where(room == room.min(), 1.0, room.min() * shares / sizes)
        return rates

    def _apply(self, values: pa.Array, rates: Rates, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        places = pc.index_in(self._values(rows), value_set=values).to_numpy()
        return sampled(rows, rates[places], row_key, self)
