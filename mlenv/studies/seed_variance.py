"""Whether two models differ by more than their seeds do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mlenv.errors import DataError

CONFIDENCE: Final = 0.95
"""Of all intervals of a comparison together."""
POWER: Final = 0.8
"""Chance with which a difference is to be seen, where seeds are counted for it."""

_MOST_SEEDS: Final = 10_000


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Second minus first model, in one metric."""

    metric: str
    first: tuple[float, ...]
    """By seed."""
    second: tuple[float, ...]
    is_paired: bool
    """Whether equal places are of the same seed, and were compared with each other."""
    confidence: float
    spread: float
    """Standard deviation of a difference between one training of each."""
    seeds: float
    """As many such differences have the error of the mean."""
    freedom: float
    """Degrees of freedom of the t distribution."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.second) - np.mean(self.first))

    @property
    def interval(self) -> tuple[float, float]:
        """Holds the true difference with the confidence."""
        half = _bound(self.confidence, self.freedom) * self.spread / math.sqrt(self.seeds)
        return self.mean - half, self.mean + half

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves zero out."""
        low, high = self.interval
        return not low <= 0 <= high

    @property
    def p_value(self) -> float:
        """How often seeds alone bring so large a difference; to be held against 1 - ``confidence``."""
        if not self.spread:
            return float(self.mean == 0)
        return float(2 * _special().stdtr(self.freedom, -abs(self.mean) * math.sqrt(self.seeds) / self.spread))

    @property
    def visible(self) -> float:
        """Smallest true difference that so many seeds show, four times in five."""
        low, high = 0.0, self.spread
        while self._power(high, self.seeds, self.freedom) < POWER:
            high *= 2
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self._power(middle, self.seeds, self.freedom) < POWER else (low, middle)
        return high

    @property
    def seeds_needed(self) -> int | None:
        """Fewest seeds that show a true difference as large as the one measured, four times in five; None for more than ten thousand."""

        def suffice(seeds: int) -> bool:
            return self._power(abs(self.mean), seeds, (seeds - 1) * (1 if self.is_paired else 2)) >= POWER

        low, high = 1, _MOST_SEEDS
        if not suffice(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if suffice(middle) else (middle, high)
        return high

    def _power(self, effect: float, seeds: float, freedom: float) -> float:
        """Chance that the interval leaves zero out when the true difference is ``effect``."""
        if not self.spread:
            return 1.0
        special, bound = _special(), _bound(self.confidence, freedom)
        shift = effect * math.sqrt(seeds) / self.spread
        # Over the standard deviations that the seeds may happen to have: noncentral t itself fails for large shifts.
        shares = (np.arange(200) + 0.5) / 200
        deviations = np.sqrt(2 * special.gammaincinv(freedom / 2, shares) / freedom)
        return float(np.mean(special.ndtr(shift - bound * deviations) + special.ndtr(-shift - bound * deviations)))


def difference(
    metric: str, first: Sequence[float], second: Sequence[float], *, is_paired: bool, confidence: float = CONFIDENCE
) -> Difference:
    """Compares the values of two models over their seeds, by a t test: of the differences within each seed, or Welch's.

    Args:
        is_paired: whether equal places are of the same seed. Luck that both models share is then no noise.

    Raises:
        DataError: fewer than two seeds, or a value that is no number.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if min(len(one), len(two)) < 2:
        received = f"{len(one)} and {len(two)}"
        raise DataError(metric, expected="at least two seeds of each model", received=received, fix="train with more seeds")
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise DataError(metric, expected="a number from every seed", received=[*first, *second], fix="leave the metric out")
    if is_paired:
        variance, freedom, seeds = float((two - one).var(ddof=1)), len(one) - 1.0, float(len(one))
    else:
        variance, freedom, seeds = _welch(one, two)
    return Difference(
        metric=metric,
        first=tuple(one.tolist()),
        second=tuple(two.tolist()),
        is_paired=is_paired,
        confidence=confidence,
        spread=math.sqrt(variance),
        seeds=seeds,
        freedom=freedom,
    )


def sentence(found: Difference, first: str, second: str, *, higher_is_better: bool) -> str:
    """What was found, in plain words."""
    counts = sorted({len(found.first), len(found.second)})
    seeds = " and ".join(map(str, counts))
    if found.is_real:
        better, worse = (second, first) if (found.mean > 0) == higher_is_better else (first, second)
        low, high = sorted(map(abs, found.interval))
        interval = f"{100 * found.confidence:.4g} % interval {_short(low)} to {_short(high)}"
        return f"{better} is better than {worse} in {found.metric} by {_short(abs(found.mean))} ({interval})."
    if not found.spread:
        return f"{first} and {second} are equal in {found.metric}, with every seed."
    needed = "more than 10,000" if found.seeds_needed is None else f"about {found.seeds_needed:,}"
    return (
        f"No difference in {found.metric} can be told from {seeds} seeds. To see one of {_short(abs(found.mean))}, as measured, "
        f"you need {needed} seeds; {seeds} show one of {_short(found.visible)} or more."
    )


def _welch(one: Any, two: Any) -> tuple[float, float, float]:
    """Variance of a difference of one seed each, degrees of freedom, and how many such differences the error of the mean is that of."""
    variances, sizes = np.array([one.var(ddof=1), two.var(ddof=1)]), np.array([len(one), len(two)])
    parts = variances / sizes
    if not parts.any():
        return 0.0, float(sizes.sum() - 2), float(sizes.min())
    freedom = parts.sum() ** 2 / (parts**2 / (sizes - 1)).sum()
    return float(variances.sum()), float(freedom), float(variances.sum() / parts.sum())


def _bound(confidence: float, freedom: float) -> float:
    return float(_special().stdtrit(freedom, (1 + confidence) / 2))


def _short(value: float) -> str:
    return f"{value:.2g}"


def _special() -> Any:
    from scipy import special

    return special
