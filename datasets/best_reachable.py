"""How well the best possible model would do on a simulated log."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl

from mlenv.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What the true probabilities of one task reach on the labels that were drawn from them."""

    auc: float
    """NaN when all labels are the same."""
    normalized_entropy: float
    """NaN when all labels are the same."""
    positive_rate: float


def best_reachable(folder: Path, days: Collection[date] | None = None) -> dict[str, Truth]:
    """Judges the true probabilities of a simulated log, by task: on the given days or on all; conversion on clicked rows only.

    Raises:
        DataError: a day is not in the log, or the log does not say what is true.
    """
    known = {date.fromisoformat(path.name.removeprefix("date=")): path for path in sorted(folder.glob("date=*"))}
    missing = sorted(day.isoformat() for day in days or () if day not in known)
    if missing or not known:
        found = f"{min(known)} to {max(known)}" if known else "no days"
        raise DataError(
            str(folder),
            expected=f"a simulated log with {', '.join(missing) or 'at least one day'}",
            received=found,
            fix="mlenv data simulate writes one",
        )
    columns = ["click", "conversion", "true_click_probability", "true_conversion_probability"]
    try:
        rows = pl.concat(
            [pl.read_parquet(path / "*.parquet", columns=columns) for day, path in known.items() if days is None or day in days]
        )
    except pl.exceptions.ColumnNotFoundError as error:
        raise DataError(
            str(folder),
            expected="a simulated log, which has true probabilities",
            received=f"no column {error}",
            fix="mlenv data simulate writes one",
        ) from error
    clicked = rows.filter(pl.col("click") == 1)
    return {
        "click": _judge(rows["click"], rows["true_click_probability"]),
        "conversion": _judge(clicked["conversion"], clicked["true_conversion_probability"]),
    }


def _judge(labels: pl.Series, probabilities: pl.Series) -> Truth:
    is_positive = labels.to_numpy() == 1
    positives, total = int(is_positive.sum()), len(is_positive)
    rate = positives / total if total else math.nan
    if positives in (0, total):
        return Truth(auc=math.nan, normalized_entropy=math.nan, positive_rate=rate)
    ranks = probabilities.rank("average").to_numpy()
    likelihoods = np.where(is_positive, probabilities, 1 - probabilities).astype(np.float64)
    base_entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    return Truth(
        auc=float(ranks[is_positive].sum() - positives * (positives + 1) / 2) / (positives * (total - positives)),
        normalized_entropy=float(-np.log(likelihoods).mean()) / base_entropy,
        positive_rate=rate,
    )
