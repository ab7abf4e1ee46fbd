"""How the predictions of a task are distributed, counted in so few numbers that windows are compared without their rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

EDGES: Final[Floats] = np.linspace(-12.0, 12.0, 481)
"""Of the bins, as logits; what is beyond them counts in the first and the last one."""
PARTS: Final = 10
"""Parts of the reference that hold about as many rows each, over which distributions are compared."""


@dataclass(frozen=True)
class ScoreCounts:
    """Predictions of one task, and how they agree with the labels that there are."""

    counts: Integers
    """Rows by bin of ``EDGES``."""
    total: float
    """Sum of the predictions."""
    rows: int
    labelled: float
    """Sum of the weights of rows with a label; the sums below are weighted in the same way."""
    expected: float
    """Sum of the predictions of rows with a label."""
    positives: float
    """Sum of the labels."""

    @classmethod
    def of(cls, predictions: Floats, labels: Floats, weights: Floats) -> ScoreCounts:
        """Counts predictions, labels and weights ``(rows,)``; a weight of 0 is no label."""
        clipped = np.clip(predictions, 1e-12, 1 - 1e-12)
        bins = np.clip(np.searchsorted(EDGES, np.log(clipped) - np.log1p(-clipped), side="right") - 1, 0, len(EDGES) - 2)
        known = weights > 0
        return cls(
            counts=np.bincount(bins, minlength=len(EDGES) - 1).astype(np.int64),
            total=float(predictions.sum()),
            rows=len(predictions),
            labelled=float(weights[known].sum()),
            expected=float((predictions[known] * weights[known]).sum()),
            positives=float((labels[known] * weights[known]).sum()),
        )

    def merged(self, other: ScoreCounts) -> ScoreCounts:
        """Both together."""
        return ScoreCounts(
            self.counts + other.counts,
            self.total + other.total,
            self.rows + other.rows,
            self.labelled + other.labelled,
            self.expected + other.expected,
            self.positives + other.positives,
        )

    @property
    def mean(self) -> float:
        """Of the predictions."""
        return self.total / self.rows

    @property
    def calibration(self) -> float:
        """Sum of the predictions over sum of the labels; nan without a positive label."""
        return self.expected / self.positives if self.positives else float("nan")

    def to_plain(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {**self.__dict__, "counts": self.counts.tolist()}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> ScoreCounts:
        """The inverse of ``to_plain``."""
        return cls(**{**plain, "counts": np.array(plain["counts"], np.int64)})


def cumulative(counts: ScoreCounts) -> tuple[Floats, Floats]:
    """Predictions at the upper ends of the bins, and the share of the rows up to each."""
    return 1 / (1 + np.exp(-EDGES[1:])), np.cumsum(counts.counts) / max(counts.rows, 1)


def in_parts(now: ScoreCounts, reference: ScoreCounts) -> tuple[Integers, Integers]:
    """Rows of both by tenths of the reference, as near as whole bins allow; empty parts are joined with the next."""
    reached = np.cumsum(reference.counts) / max(reference.rows, 1)
    part = np.searchsorted(np.arange(1, PARTS) / PARTS, reached - reference.counts / max(reference.rows, 1) / 2, side="right")
    sides = [np.bincount(part, counts, PARTS).astype(np.int64) for counts in (now.counts, reference.counts)]
    kept = sides[1] > 0
    return sides[0][kept], sides[1][kept]


def stability(now: Integers, reference: Integers) -> float:
    """Population stability index of rows by part: 0 for equal shares. A part without rows counts as half a row."""
    shares = [np.maximum(side, 0.5) / max(side.sum(), 1) for side in (now, reference)]
    return float(((shares[0] - shares[1]) * np.log(shares[0] / shares[1])).sum())


def distance(now: ScoreCounts, reference: ScoreCounts) -> float:
    """Largest distance of the two cumulative distributions (Kolmogorov and Smirnov), at the edges of the bins."""
    reached = [np.cumsum(side.counts) / max(side.rows, 1) for side in (now, reference)]
    return float(np.abs(reached[0] - reached[1]).max())
