"""How well offline metrics have foretold what experiments found online."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from mlenv.errors import DataError

Floats = NDArray[np.float64]

LEAST: Final = 8
"""Experiments below which nothing is said about a metric."""
RESAMPLES: Final = 2000
ONLINE, ERROR = "online", "online_error"
"""Columns of the table: the change that an experiment measured, and its standard error."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One offline metric beside what came of it."""

    metric: str
    experiments: int
    agreement: float
    """Share of the experiments whose online change has the sign of the offline one, each weighted by how sure its sign is."""
    rank_correlation: float
    """Spearman's."""
    low: float
    high: float
    """95 % interval of the rank correlation, of experiments drawn anew and online changes that vary by their errors."""
    slope: float
    """Online change for one unit of the offline one, by least squares weighted by the errors, through 0."""
    slope_error: float

    @property
    def sentence(self) -> str:
        """What may be said."""
        if self.experiments < LEAST:
            return f"{self.experiments} experiments are too few to say anything (at least {LEAST})"
        if self.low > 0:
            return "has foretold the online change"
        if self.high < 0:
            return "has foretold the opposite of the online change"
        return "no relation is shown"


def read_table(path: Path) -> pl.DataFrame:
    """A CSV or Parquet file with a row for each experiment.

    Raises:
        DataError: it is not there, or ``online`` and ``online_error`` are not in it as numbers, or errors are not above 0.
    """
    try:
        frame = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(str(path), expected="a CSV or Parquet file", received=str(error).partition("\n")[0]) from error
    for name in (ONLINE, ERROR):
        if name not in frame.columns or not frame.schema[name].is_numeric():
            fix = "give each experiment its measured change and the standard error of it"
            raise DataError(f"{path}, column {name!r}", expected="numbers", received=frame.columns, fix=fix)
    if not (frame.get_column(ERROR).fill_null(0) > 0).all():
        raise DataError(f"{path}, column {ERROR!r}", expected="standard errors above 0", received=frame.get_column(ERROR).min())
    return frame


def records(frame: pl.DataFrame, metrics: Sequence[str] = (), seed: int = 0) -> list[Record]:
    """One for each offline metric, the best first.

    Args:
        metrics: columns; by default all numbers beside ``online`` and ``online_error``.

    Raises:
        DataError: a metric is not in the table, or there is none.
    """
    numbers = [name for name, kind in frame.schema.items() if kind.is_numeric() and name not in (ONLINE, ERROR)]
    for name in metrics:
        if name not in numbers:
            raise DataError(f"metric {name!r}", expected="a column of numbers of the table", received=numbers)
    wanted = list(metrics) or numbers
    if not wanted:
        raise DataError("table", expected="a column for each offline metric", received=frame.columns)
    return sorted((_record(frame, name, seed) for name in wanted), key=lambda one: -one.rank_correlation)


def _record(frame: pl.DataFrame, metric: str, seed: int) -> Record:
    known = frame.filter(pl.col(metric).is_not_null() & pl.col(ONLINE).is_not_null())
    offline, online, error = (known.get_column(name).cast(pl.Float64).to_numpy() for name in (metric, ONLINE, ERROR))
    certainty = np.abs(2 * stats.norm.cdf(online / error) - 1)  # 0 where the sign could as well be the other
    agrees = np.sign(offline) == np.sign(online)
    squares = float((offline**2 / error**2).sum())
    low, high = _interval(offline, online, error, np.random.default_rng(seed))
    return Record(
        metric=metric,
        experiments=len(known),
        agreement=float((certainty * agrees).sum() / certainty.sum()) if certainty.sum() else math.nan,
        rank_correlation=_spearman(offline, online),
        low=low,
        high=high,
        slope=float((offline * online / error**2).sum()) / squares if squares else math.nan,
        slope_error=1 / math.sqrt(squares) if squares else math.nan,
    )


def _spearman(offline: Floats, online: Floats) -> float:
    if len(offline) < 2 or np.ptp(offline) == 0 or np.ptp(online) == 0:
        return 0.0
    return float(np.corrcoef(stats.rankdata(offline), stats.rankdata(online))[0, 1])


def _interval(offline: Floats, online: Floats, error: Floats, random: np.random.Generator) -> tuple[float, float]:
    if len(offline) < 2:
        return -1.0, 1.0
    drawn = []
    for _ in range(RESAMPLES):
        chosen = random.integers(0, len(offline), len(offline))
        drawn.append(_spearman(offline[chosen], online[chosen] + random.normal(0, error[chosen])))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)
