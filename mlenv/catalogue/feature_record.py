"""What a run records of the features it was trained on, day by day: ``features.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from mlenv.checks.findings import Chance
from mlenv.checks.validation import Covered, drift_of_day
from mlenv.datasets.statistics import ColumnStatistics, Statistics

FEATURES_FILE = "features.json"
"""Name of the file in the output folder of a training, and among the artifacts of its run."""
FORMAT = 1
"""Raised when the file changes in a way that an older mlenv would misread."""


@dataclass(frozen=True, kw_only=True)
class FeatureDay:
    """One feature on one day of the training window."""

    rows: int
    """That were read; of a large window a sample is."""
    coverage: float
    """Share of them in which the feature is there."""
    mean: float | None
    """Of a number; None for ids and where there is none."""
    distinct: int | None
    """Different ids, about; None for numbers."""
    drift: float | None
    """Population stability index of the day against the other days; None without other days."""
    drift_by_chance: float | None
    """How much of it chance brings about in so few rows."""
    label_rates: dict[str, float | None]
    """By task, of the rows in which the feature is there; None where none of them counts."""


@dataclass(frozen=True, kw_only=True)
class FeatureRecord:
    """All features of a run."""

    rows_per_request: float
    """How many rows tell as much as one independent row."""
    features: dict[str, dict[str, FeatureDay]]
    """By feature and day, in the order of the days; rows without a day are under an empty name."""

    def covered(self, name: str) -> Covered:
        """A feature over all days."""
        days = self.features[name].values()
        rows = sum(day.rows for day in days)
        return Covered(sum(day.coverage * day.rows for day in days) / max(rows, 1), rows)

    def to_json(self) -> str:
        """A document that ``from_json`` reads back."""
        return json.dumps({"format": FORMAT} | asdict(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> FeatureRecord:
        """The inverse of ``to_json``.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: the text is something else.
        """
        plain = json.loads(text)
        if plain["format"] != FORMAT:
            raise ValueError(f"format {plain['format']}")
        features = {name: {day: FeatureDay(**entry) for day, entry in days.items()} for name, days in plain["features"].items()}
        return cls(rows_per_request=plain["rows_per_request"], features=features)


def record_features(window: Statistics, days: Mapping[str, Statistics], significance: float) -> FeatureRecord:
    """
    Args:
        window: all days together.
        significance: standard errors that count as chance.
    """
    chance = Chance(significance, window.rows_per_request)
    features: dict[str, dict[str, FeatureDay]] = {column.feature: {} for column in window.columns.values()}
    for day, statistics in days.items():
        if statistics.rows:
            for feature, found in features.items():
                columns = {name: column for name, column in statistics.columns.items() if column.feature == feature}
                found[day] = _of_day(statistics, columns, window, chance)
    return FeatureRecord(rows_per_request=window.rows_per_request, features=features)


def _of_day(day: Statistics, columns: Mapping[str, ColumnStatistics], window: Statistics, chance: Chance) -> FeatureDay:
    """A sequence counts by its first field, and drifts as the one that drifts most."""
    first = next(iter(columns.values()))
    drifts = [drift_of_day(column, window.columns[name], chance) for name, column in columns.items()]
    drift, by_chance = max((one for one in drifts if not math.isnan(one[0])), key=lambda one: one[0] / one[1], default=(math.nan, math.nan))
    present = day.labels - first.absent
    return FeatureDay(
        rows=day.rows,
        coverage=first.coverage,
        mean=first.numbers.mean if first.values is None and first.numbers is not None and first.numbers.count else None,
        distinct=None if first.values is None else first.values.num_distinct,
        drift=_known(drift),
        drift_by_chance=_known(by_chance),
        label_rates={task: _known(day.label_rate(task, present)[1]) for task in day.tasks},
    )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
