"""Two predictions of the same rows, one from a log and one made now: how far they are apart, in all and by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from mlenv.loops.metrics import MAX_SEGMENT_VALUES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How well replayed predictions of one task agree with the logged ones in a group of rows."""

    task: str
    group: str
    """Empty for all rows, ``segment=value``, or the hour."""
    num_rows: int
    differs: float
    """Share of the rows that are further apart than the tolerance."""
    logged: float
    """Mean prediction in the log."""
    replayed: float
    apart: float
    """Mean absolute difference."""
    largest: float


@dataclass(frozen=True, kw_only=True)
class PairedScores:
    """Both predictions, row by row."""

    tasks: Sequence[str]
    """Of the columns."""
    logged: Floats
    """``(rows, tasks)``; NaN where the log has none."""
    replayed: Floats
    """``(rows, tasks)``."""
    tolerance: float
    """Difference that does not count."""

    @property
    def apart(self) -> Floats:
        """``(rows, tasks)``; 0 where the log has no prediction."""
        apart: Floats = np.nan_to_num(np.abs(self.logged - self.replayed))
        return apart

    @property
    def differing(self) -> Ints:
        """Rows in which some task is further apart than the tolerance."""
        return np.flatnonzero((self.apart > self.tolerance).sum(axis=1))

    def rows(self, places: Ints) -> PairedScores:
        """Some of the rows."""
        return replace(self, logged=self.logged[places], replayed=self.replayed[places])

    def parity(self, groups: pl.Series | None = None) -> list[Parity]:
        """Of all rows, or of each group in order; of many groups only those with the most rows."""
        found = []
        for place, task in enumerate(self.tasks):
            frame = pl.DataFrame({"logged": self.logged[:, place], "replayed": self.replayed[:, place]})
            frame = frame.with_columns((pl.lit("") if groups is None else groups).alias("group")).filter(pl.col("logged").is_not_nan())
            apart = (pl.col("logged") - pl.col("replayed")).abs()
            grouped = frame.group_by("group").agg(
                pl.len().alias("num_rows"),
                (apart > self.tolerance).mean().alias("differs"),
                pl.col("logged").mean(),
                pl.col("replayed").mean(),
                apart.mean().alias("apart"),
                apart.max().alias("largest"),
            )
            found += [Parity(task=task, **row) for row in grouped.top_k(MAX_SEGMENT_VALUES, by="num_rows").sort("group").to_dicts()]
        return found
