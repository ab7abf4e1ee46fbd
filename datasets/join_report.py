"""How well a join works: how many rows find something, and how old it is or how long it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PER_OCTAVE = 32
"""Bins per doubling of an age: a quantile is right to about one part in fifty."""
_BINS = 48 * _PER_OCTAVE
_QUANTILES = (0.1, 0.5, 0.9, 0.99)
_SECOND = 1_000_000
_HOUR = 3600
_EXAMPLES = 3


@dataclass(frozen=True)
class Matches:
    """Of some rows: how many found a row in the table, and how old these were. Adds up to those of more rows."""

    rows: int = 0
    matched: int = 0
    ages: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    """Matched rows by the age of what they found, in bins of equal ratio; all zero without times."""
    unmatched: tuple[str, ...] = ()
    """A few keys that found nothing."""
    unknown: int = 0
    """Rows of which it cannot be said yet whether they find something."""

    def __add__(self, other: Matches) -> Matches:
        unmatched = tuple(dict.fromkeys((*self.unmatched, *other.unmatched)))[:_EXAMPLES]
        unknown = self.unknown + other.unknown
        return Matches(self.rows + other.rows, self.matched + other.matched, self.ages + other.ages, unmatched, unknown)

    @property
    def rate(self) -> float:
        """Share of the rows of which it is known that found something; 1 of no rows."""
        return self.matched / (self.rows - self.unknown) if self.rows > self.unknown else 1.0

    def as_json(self, ages: str) -> dict[str, Any]:
        """Counts, rate, and under the name ``ages`` quantiles of the age in hours where there are times."""
        plain: dict[str, Any] = {"rows": self.rows, "unknown": self.unknown, "matched": self.matched, "match_rate": self.rate}
        if self.ages.any():
            plain[ages] = {f"p{share * 100:.0f}": self._age(share) for share in _QUANTILES}
        return plain

    def _age(self, share: float) -> float:
        counts = np.cumsum(self.ages)
        return float(2 ** (np.searchsorted(counts, share * counts[-1]) / _PER_OCTAVE) - 1) / _HOUR


def count_ages(microseconds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ages, none of them negative, as ``Matches`` keeps them."""
    bins = np.minimum(np.log2(1 + microseconds / _SECOND) * _PER_OCTAVE, _BINS - 1).round().astype(np.int64)
    return np.bincount(bins, minlength=_BINS)


def report(table: str, by_day: Mapping[str, Sequence[Matches]], ages: str = "staleness_hours") -> tuple[Matches, dict[str, Any]]:
    """All together, and what is kept of them: table, totals, and the same for each day."""
    days = {day: sum(parts, Matches()) for day, parts in by_day.items()}
    total = sum(days.values(), Matches())
    return total, {
        "table": table,
        **total.as_json(ages),
        "days": {day: matches.as_json(ages) for day, matches in sorted(days.items()) if day},
    }
