"""Whether back-filled features can be trusted: their days beside those that were logged, and their values beside the logged ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from mlenv.checks.findings import Chance, Measure
from mlenv.checks.validation import LEAST_LABELS
from mlenv.config import ChecksConfig, WindowConfig
from mlenv.datasets.agreement import Agreement, measure_agreement
from mlenv.datasets.statistics import Statistics, by_day, collect, days_of, statistics_columns
from mlenv.errors import ConfigError, nearest, placed_under
from mlenv.schema import Schema

if TYPE_CHECKING:
    from mlenv.datasets.parquet_source import ParquetSource


class DayAuc(NamedTuple):
    """How well one column alone tells the labels of a day."""

    day: str
    auc: float
    positives: int
    negatives: int

    @property
    def weight(self) -> float:
        """What the day counts in a mean."""
        return self.positives * self.negatives / (self.positives + self.negatives)

    @property
    def variance(self) -> float:
        """Of the AUC, over independent rows.

        Source: Hanley and McNeil, "The meaning and use of the area under a ROC curve", Radiology 143, 1982.
        """
        auc, positives, negatives = self.auc, self.positives, self.negatives
        both_positive, both_negative = auc / (2 - auc) - auc**2, 2 * auc**2 / (1 + auc) - auc**2
        return (auc * (1 - auc) + (positives - 1) * both_positive + (negatives - 1) * both_negative) / (positives * negatives)


@dataclass(frozen=True)
class LabelAuc:
    """How well one column alone tells the labels, on average over days.

    Day by day, because an id tells the more the more rows it has: sides with different numbers of days could not be compared.
    """

    days: tuple[DayAuc, ...]

    @property
    def mean(self) -> float:
        """Days with more labels count more."""
        return sum(day.weight * day.auc for day in self.days) / sum(day.weight for day in self.days)

    @property
    def variance(self) -> float:
        """Of the mean."""
        return sum(day.weight**2 * day.variance for day in self.days) / sum(day.weight for day in self.days) ** 2

    @property
    def highest(self) -> DayAuc:
        """The day on which it is highest."""
        return max(self.days, key=lambda day: day.auc)


@dataclass(frozen=True)
class Side:
    """The back-filled days of a window, or the logged ones."""

    statistics: Statistics
    aucs: dict[tuple[str, str], LabelAuc]
    """By column and task; without those that have too few labels on every day."""


def read_sides(source: ParquetSource, backfilled: WindowConfig) -> tuple[Side, Side]:
    """Reads the source once.

    Returns:
        Its back-filled days, and all others.

    Raises:
        ConfigError: all days are back-filled, or none, or the rows have no day.
        DataError: the transforms leave no row.
    """
    if source.days:
        _check_days(set(source.days), backfilled)
    columns = statistics_columns(source.schema, source.column_names)
    parts = (part for batch in source.record_batches(columns) for part in by_day(batch, source.schema))
    statistics: dict[bool, list[Statistics]] = {True: [], False: []}
    aucs: dict[bool, dict[tuple[str, str], list[DayAuc]]] = {True: {}, False: {}}
    days = set()
    for day, run in groupby(parts, key=itemgetter(0)):
        part, is_backfilled = collect((rows for _, rows in run), source.schema), backfilled.holds(day)
        days.add(day)
        statistics[is_backfilled] = [reduce(Statistics.merged, [*statistics[is_backfilled], part])]
        for key, auc in _label_aucs(day, part):
            aucs[is_backfilled].setdefault(key, []).append(auc)
    if not days:
        raise source.nothing_left()
    if days == {""}:
        fix = "write folders date=YYYY-MM-DD, or name a timestamp in schema.event_time"
        raise ConfigError("backfilled", expected="rows with a day", received="rows without one", fix=fix)
    _check_days(days, backfilled)
    first, second = (
        Side(statistics[side][0], {key: LabelAuc(tuple(found)) for key, found in aucs[side].items()}) for side in (True, False)
    )
    return first, second


def compare_sides(backfilled: Side, logged: Side, checks: ChecksConfig) -> Iterator[Measure]:
    """How much more each feature tells of the labels on the back-filled days: what it could not know at the time."""
    rows_per_request = max(side.statistics.rows_per_request for side in (backfilled, logged))
    for (name, task), auc in backfilled.aucs.items():
        if (name, task) in logged.aucs:
            usual = logged.aucs[name, task]
            excess = auc.mean - usual.mean
            error = math.sqrt(rows_per_request * (auc.variance + usual.variance))
            detail = (
                f"alone it tells positives of {task} from negatives with an AUC of {auc.mean:.3f} on back-filled days, of {usual.mean:.3f} "
                f"on logged ones; the highest is {auc.highest.auc:.3f} on {auc.highest.day}."
            )
            feature = backfilled.statistics.columns[name].feature
            is_beyond = excess > checks.significance * error
            yield Measure("backfill_label_auc", f"{name} for {task}", max(excess, 0.0), detail, is_beyond, feature)


def check_pairs(source: ParquetSource, checks: ChecksConfig) -> None:
    """
    Raises:
        ConfigError: a column of ``checks.backfills`` is not there.
    """
    for name in (name for pair in checks.backfills.items() for name in pair):
        if name not in source.column_names:
            fix = nearest(name, source.column_names)
            raise ConfigError("checks.backfills", expected="columns of the data", received=name, fix=fix)


def read_pairs(source: ParquetSource, checks: ChecksConfig) -> dict[str, Agreement]:
    """Reads the columns of ``checks.backfills`` once, by the name of the back-filled one; nothing where there are none.

    Raises:
        ConfigError: a column is not there, or a pair cannot be compared, or no row has both.
    """
    if not checks.backfills:
        return {}
    check_pairs(source, checks)
    names = [name for pair in checks.backfills.items() for name in pair]
    days = [name for name in ("date", source.schema.event_time) if name in source.column_names]
    batches = source.record_batches(tuple(dict.fromkeys([*names, *days])))
    with placed_under("checks.backfills"):
        found = measure_agreement(
            ((batch, days_of(batch, source.schema)) for batch in batches), checks.backfills, checks.backfill_tolerance
        )
    for name, agreement in found.items():
        if not agreement.num_both:
            received = f"{agreement.first} rows with {name}, {agreement.second} with {checks.backfills[name]}, none with both"
            raise ConfigError(
                "checks.backfills", expected="columns that some rows have both of", received=received, fix="choose a window that has both"
            )
    return found


def compare_pairs(pairs: dict[str, Agreement], schema: Schema, checks: ChecksConfig) -> Iterator[Measure]:
    """In how many rows a back-filled value is another than the logged one, and how many it leaves out."""
    features = {key.column: key.feature for key in schema.sparse_keys} | {dense.column: dense.name for dense in schema.dense_columns}
    chance = Chance(checks.significance, 1.0)
    for name, pair in pairs.items():
        logged, feature, share = checks.backfills[name], features.get(name, ""), pair.differing_share
        detail = f"it differs from {logged} in {share:.2%} of the {pair.num_both:,} rows with both."
        yield Measure("backfill_disagreement", f"{name} beside {logged}", share, detail, True, feature)
        day, worst = pair.worst_day
        if day:
            detail = f"it differs from {logged} in {worst:.2%} of the {pair.both[day]:,} rows with both of that day."
            is_beyond = chance.is_less_than(worst, pair.both[day], share, pair.num_both)
            yield Measure("backfill_disagreement", f"{name} on {day}", worst, detail, is_beyond, feature)
        missing = 1 - pair.num_both / pair.second
        detail = f"{missing:.2%} of the {pair.second:,} rows with {logged} miss it."
        yield Measure("coverage_drop", f"{name} beside {logged}", missing, detail, True, feature)


def _label_aucs(day: str, part: Statistics) -> Iterator[tuple[tuple[str, str], DayAuc]]:
    """Of each column and task, where the day has enough labels."""
    for name, column in part.columns.items():
        for task, auc in zip(part.tasks, column.label_aucs(), strict=True):
            counted, rate = part.label_rate(task, part.labels)
            positives = round(counted * rate) if counted else 0
            if min(positives, counted - positives) >= LEAST_LABELS and not math.isnan(auc):
                yield (name, task), DayAuc(day, auc, positives, counted - positives)


def _check_days(days: set[str], backfilled: WindowConfig) -> None:
    held = {day for day in days if backfilled.holds(day)}
    if not held or held == days:
        received = f"{backfilled}, which holds {'all' if held else 'none'} of the days {min(days)} to {max(days)}"
        raise ConfigError("backfilled", expected="some of the days of the window, and not all", received=received)
