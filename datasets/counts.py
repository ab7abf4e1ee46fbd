"""Counting values and numbers in one pass, in bounded memory, so that the counts of parts add up to those of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlenv.datasets.hashing import hash_ids

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Keys = NDArray[np.uint64]

VALUE_CAPACITY = 16_384
"""Distinct values of a column that are counted exactly; of more, a sample of at least half as many."""
ROW_CAPACITY = 4_096
"""The same for whole rows and for row keys, which are all distinct unless something is wrong."""
UNBOUNDED = 2**62

BIN_RATIO = 1.02
"""Upper over lower end of a bin of numbers: a quantile is off by at most 1 % of its value."""
SMALLEST, LARGEST = 1e-9, 1e18
"""Sizes that bins tell apart; smaller numbers count as zero, larger ones as the largest. Least, greatest and mean are exact."""

_LOG_RATIO = math.log(BIN_RATIO)
_LOWEST_BIN = math.floor(math.log(SMALLEST) / _LOG_RATIO)
_HIGHEST_BIN = math.ceil(math.log(LARGEST) / _LOG_RATIO)
_ZERO_KEY = _HIGHEST_BIN - _LOWEST_BIN + 2


def tally(codes: Integers, num_codes: int, outcomes: Sequence[Integers]) -> Integers:
    """How often each code occurs, and for each task how often it counts and is positive: ``(num_codes, 1 + 2 * tasks)``.

    Args:
        codes: ``(n,)`` in [0, num_codes).
        outcomes: by task ``(n,)``: 0 does not count, 1 negative, 2 positive.
    """
    counted = np.empty((num_codes, 1 + 2 * len(outcomes)), np.int64)
    counted[:, 0] = np.bincount(codes, minlength=num_codes)
    for place, outcome in enumerate(outcomes):
        by_outcome = np.bincount(3 * codes + outcome, minlength=3 * num_codes).reshape(num_codes, 3)
        counted[:, 1 + 2 * place] = by_outcome[:, 1] + by_outcome[:, 2]
        counted[:, 2 + 2 * place] = by_outcome[:, 2]
    return counted


@dataclass(frozen=True)
class Counts:
    """How often each distinct value occurs, and with which labels.

    A value is kept while the last ``level`` bits of its hash are zero, and the level is the lowest at which no more than
    ``capacity`` values are kept. So the counts of the kept values are exact, each value is kept with the same probability
    whatever its count, and which ones are kept follows from the set of values alone, in whatever parts and order they came.

    Source: Gibbons, "Distinct Sampling for Highly-Accurate Answers to Distinct Values Queries and Event Reports", VLDB 2001.
    """

    keys: Keys
    """``(n,)``: hashes of the kept values, or numbers of bins; ascending."""
    tallies: Integers
    """``(n, 1 + 2 * tasks)``, as ``tally`` gives them."""
    values: pa.Array | None
    """``(n,)``: the kept values themselves, int64 or string; None where nobody asks for them."""
    capacity: int
    level: int = 0

    @classmethod
    def of(cls, keys: Keys, tallies: Integers, values: pa.Array | None, capacity: int) -> Counts:
        """Adds up the tallies of equal keys."""
        return _settled(keys, tallies, values, capacity, level=0)

    def merged(self, other: Counts) -> Counts:
        """The counts of both parts together."""
        values = None if self.values is None or other.values is None else _joined(self.values, other.values)
        keys, tallies = np.concatenate([self.keys, other.keys]), np.concatenate([self.tallies, other.tallies])
        return _settled(keys, tallies, values, self.capacity, max(self.level, other.level))

    def at(self, level: int) -> Counts:
        """The same counts, of the fewer values that a higher level keeps."""
        kept = _is_kept(self.keys, level)
        values = None if self.values is None else self.values.filter(pa.array(kept))
        return replace(self, keys=self.keys[kept], tallies=self.tallies[kept], values=values, level=level)

    @property
    def num_distinct(self) -> int:
        """Exact up to the capacity; beyond it with a standard error of at most ``sqrt(2 / capacity)`` of it."""
        return len(self.keys) << self.level

    @property
    def num_kept(self) -> int:
        """Occurrences of the kept values."""
        return int(self.tallies[:, 0].sum())

    @property
    def repeated_share(self) -> float:
        """Share of the occurrences that come after the first one of their value."""
        return 1 - len(self.keys) / self.num_kept if self.num_kept else 0.0

    def top(self, number: int) -> list[tuple[Any, Integers]]:
        """The most frequent of the kept values, with their tallies; equally frequent ones in the order of their hashes."""
        order = np.argsort(-self.tallies[:, 0], kind="stable")[:number]
        return [(self.keys[place] if self.values is None else self.values[int(place)].as_py(), self.tallies[place]) for place in order]

    def by_value(self) -> dict[Any, Integers]:
        """Tallies of the kept values, in the order of the values."""
        assert self.values is not None
        return dict(sorted(zip(self.values.to_pylist(), self.tallies, strict=True)))

    def to_plain(self) -> dict[str, Any]:
        """What JSON can hold. Hashes follow from values."""
        plain: dict[str, Any] = {"level": self.level, "capacity": self.capacity, "tallies": self.tallies.tolist()}
        if self.values is None:
            return plain | {"keys": self.keys.tolist()}
        return plain | {"type": str(self.values.type), "values": self.values.to_pylist()}

    @classmethod
    def from_plain(cls, plain: dict[str, Any], num_tasks: int) -> Counts:
        """The inverse of ``to_plain``."""
        tallies = np.array(plain["tallies"], np.int64).reshape(-1, 1 + 2 * num_tasks)
        values = pa.array(plain["values"], _VALUE_TYPES[plain["type"]]) if "values" in plain else None
        keys = np.array(plain["keys"], np.uint64) if values is None else hash_ids(values)
        return cls(keys, tallies, values, plain["capacity"], plain["level"])


_VALUE_TYPES = {"int64": pa.int64(), "string": pa.string()}


def _joined(first: pa.Array, second: pa.Array) -> pa.Array:
    return pa.concat_arrays([first, second])


def _settled(keys: Keys, tallies: Integers, values: pa.Array | None, capacity: int, level: int) -> Counts:
    """Equal keys added up, at the lowest level from ``level`` on that keeps few enough."""
    order = np.argsort(keys, kind="stable")
    order = order[_is_kept(keys[order], level)]
    arranged = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], arranged[1:] != arranged[:-1]])) if len(arranged) else np.zeros(0, np.int64)
    summed = np.add.reduceat(tallies[order], starts, axis=0) if len(starts) else tallies[:0]
    counts = Counts(arranged[starts], summed, None if values is None else values.take(pa.array(order[starts])), capacity, level)
    while len(counts.keys) > capacity:
        counts = counts.at(counts.level + 1)
    return counts


def _is_kept(keys: Keys, level: int) -> NDArray[np.bool_]:
    is_kept: NDArray[np.bool_] = keys & np.uint64((1 << level) - 1) == 0
    return is_kept


@dataclass(frozen=True)
class Numbers:
    """How finite numbers are spread: counts in bins of constant ratio, exact extremes, mean and deviation.

    The bins are the same for every column and never move, so that adding up parts loses nothing.

    Source: Masson, Rim and Lee, "DDSketch: A Fast and Fully-Mergeable Quantile Sketch with Relative-Error Guarantees",
    VLDB 2019, arXiv:1908.10693; mean and deviation: Chan, Golub and LeVeque, "Algorithms for Computing the Sample
    Variance", The American Statistician, 1983.
    """

    bins: Counts
    mean: float
    """0 where there is none."""
    squares: float
    """Sum of the squared distances from the mean."""
    low: float
    """Least number; infinity where there is none."""
    high: float
    """Greatest number; minus infinity where there is none."""

    @classmethod
    def of(cls, numbers: Floats, outcomes: Sequence[Integers]) -> Numbers:
        """``numbers``: ``(n,)``, finite; outcomes as in ``tally``."""
        keys, codes = np.unique(_bin_keys(numbers), return_inverse=True)
        bins = Counts.of(keys, tally(codes, len(keys), outcomes), None, UNBOUNDED)
        mean = float(numbers.mean()) if len(numbers) else 0.0
        # Adding 0 makes one zero of both: which of them is the lesser hangs on the order of the parts.
        low, high = float(numbers.min(initial=math.inf)) + 0.0, float(numbers.max(initial=-math.inf)) + 0.0
        return cls(bins, mean, float(((numbers - mean) ** 2).sum()), low, high)

    def merged(self, other: Numbers) -> Numbers:
        """The numbers of both parts together."""
        total = self.count + other.count
        share, gap = other.count / max(total, 1), other.mean - self.mean
        return Numbers(
            self.bins.merged(other.bins),
            self.mean + gap * share,
            self.squares + other.squares + gap**2 * self.count * share,
            min(self.low, other.low),
            max(self.high, other.high),
        )

    @cached_property
    def count(self) -> int:
        return self.bins.num_kept

    @property
    def deviation(self) -> float:
        """Standard deviation of the population; nan where there is none."""
        return math.sqrt(self.squares / self.count) if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The number below which this share of the numbers lies, within 1 % of it; nan where there is none."""
        if not self.count:
            return math.nan
        place = int(np.searchsorted(np.cumsum(self.bins.tallies[:, 0]), share * self.count))
        centre = bin_centre(int(self.bins.keys[min(place, len(self.bins.keys) - 1)]))
        return min(max(centre, self.low), self.high)

    def to_plain(self) -> dict[str, Any]:
        """What JSON can hold."""
        extremes = {"low": self.low, "high": self.high} if self.count else {"low": None, "high": None}
        return {"bins": self.bins.to_plain(), "mean": self.mean, "squares": self.squares, **extremes}

    @classmethod
    def from_plain(cls, plain: dict[str, Any], num_tasks: int) -> Numbers:
        """The inverse of ``to_plain``."""
        low = math.inf if plain["low"] is None else plain["low"]
        high = -math.inf if plain["high"] is None else plain["high"]
        return cls(Counts.from_plain(plain["bins"], num_tasks), plain["mean"], plain["squares"], low, high)


def _bin_keys(numbers: Floats) -> Keys:
    """Numbers of bins, in the order of the numbers: negative ones, zero, positive ones."""
    sizes = np.clip(np.abs(numbers), SMALLEST, LARGEST)
    places = np.ceil(np.log(sizes) / _LOG_RATIO).astype(np.int64) - _LOWEST_BIN + 1
    signs = np.sign(numbers).astype(np.int64) * (np.abs(numbers) > SMALLEST)
    keys: Keys = (_ZERO_KEY + signs * places).view(np.uint64)
    return keys


def bin_centre(key: int) -> float:
    """Where no number of the bin is further away than 1 % of it."""
    if key == _ZERO_KEY:
        return 0.0
    place = abs(key - _ZERO_KEY) + _LOWEST_BIN - 1
    return math.copysign(2 * BIN_RATIO**place / (1 + BIN_RATIO), key - _ZERO_KEY)
