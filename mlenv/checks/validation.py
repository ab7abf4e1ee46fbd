"""Judging a window of data: by itself, and against the statistics of an earlier one."""

from __future__ import annotations

import datetime
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlenv.checks.findings import Chance, Measure, Verdict, judge
from mlenv.config import ChecksConfig, WindowConfig
from mlenv.datasets.counts import Counts, Floats, Integers, Numbers, bin_centre
from mlenv.datasets.statistics import ColumnStatistics, Statistics, collect, collect_days, statistics_columns
from mlenv.errors import DataError
from mlenv.schema import Schema

if TYPE_CHECKING:
    from mlenv.datasets.parquet_source import ParquetSource

LEAST_SHARE = 0.02
"""Ids of the baseline that make up so much of it are the parts that drift is measured over; all others are one part. Rarer ones,
such as users, come and go in bursts that no count of rows accounts for."""
LEAST_LABELS = 20
"""Positives and negatives without which an AUC says nothing."""


class Covered(NamedTuple):
    """How many rows there were, and the share of them that had a feature."""

    share: float
    rows: float


def validate_statistics(
    window: Statistics,
    baseline: Statistics | None,
    schema: Schema,
    checks: ChecksConfig,
    span: WindowConfig | None = None,
    more: Iterable[Measure] = (),
) -> Verdict:
    """Judges the statistics of a window.

    Args:
        baseline: statistics of an earlier window; without it only what a window shows by itself is judged. Features that
            it does not have are not compared.
        span: days that the window was meant to have.
        more: what was measured elsewhere and is judged with the rest.
    """
    chance = Chance(checks.significance, max(part.rows_per_request for part in (window, baseline) if part is not None))
    measures = [*_own_measures(window, span or WindowConfig())]
    if baseline is not None:
        for name, column in window.columns.items():
            if name in baseline.columns:
                measures += _compared(name, column, baseline.columns[name], chance)
        measures += _late_hours(window, baseline)
    measures += _label_rates(window, baseline, chance)
    return judge([*measures, *more], schema, checks)


def window_statistics(source: ParquetSource, *, at_most: int = 0) -> Statistics:
    """Statistics of the rows of a source, read once; of about ``at_most`` of them, from all over the window, where that is not 0.

    Raises:
        DataError: the transforms leave no row, or a row group cannot be read.
    """
    columns = statistics_columns(source.schema, source.column_names)
    return _of_source(collect(source.record_batches(columns, at_most=at_most), source.schema), source, at_most)


def window_by_day(source: ParquetSource, *, at_most: int = 0) -> tuple[Statistics, dict[str, Statistics]]:
    """The same, and those of each of its days, from one pass.

    Raises:
        DataError: see window_statistics.
    """
    columns = statistics_columns(source.schema, source.column_names)
    days = collect_days(source.record_batches(columns, at_most=at_most), source.schema)
    return _of_source(functools.reduce(Statistics.merged, days.values()), source, at_most), days


def drift_of_day(day: ColumnStatistics, window: ColumnStatistics, chance: Chance) -> tuple[float, float]:
    """Population stability index of one day of a window against its other days, and how much of it chance brings about.

    Of ids, numbers and lengths it is the one that lies furthest beyond chance; nan where there is nothing to compare.
    """
    parts = []
    if day.values is not None and window.values is not None:
        level = max(day.values.level, window.values.level)
        now, whole = day.values.at(level), window.values.at(level)
        if now.num_kept < whole.num_kept:
            parts.append(_value_parts(now, whole))
    for numbers, all_numbers in ((day.numbers, window.numbers), (day.lengths, window.lengths)):
        if numbers is not None and all_numbers is not None and numbers.count < all_numbers.count:
            parts.append(_number_parts(numbers, all_numbers))
    found = [
        (_stability(counts, counted - counts), chance.stability(len(names), counts.sum(), (counted - counts).sum()))
        for names, counts, counted in parts
        if counts.sum()
    ]
    return max(found, key=lambda one: one[0] / one[1], default=(math.nan, math.nan))


def coverage_drop(name: str, feature: str, now: Covered, before: Covered, chance: Chance) -> Measure:
    """Rows that a feature is missing from and was not missing from before; ``name`` is a column of the feature."""
    detail = f"{now.share:.2%} of the rows have it, before it was {before.share:.2%}."
    is_beyond = chance.is_less_than(now.share, now.rows, before.share, before.rows)
    return Measure("coverage_drop", name, max(before.share - now.share, 0.0), detail, is_beyond, feature)


def check_baseline(baseline: Statistics, window: Statistics, place: str) -> None:
    """
    Raises:
        DataError: the baseline has no row, or is of another schema: it has none of the features, or one of another kind.
    """
    fix = "name statistics of this schema, or write them with mlenv validate CONFIG --out DIR"
    if not baseline.rows:
        raise DataError(place, expected="statistics of some rows", received="of none", fix=fix)
    common = [name for name in window.columns if name in baseline.columns]
    if not common:
        received = f"statistics of {', '.join(list(baseline.columns)[:5])}"
        raise DataError(place, expected=f"statistics of {', '.join(list(window.columns)[:5])}", received=received, fix=fix)
    for name in common:
        now, before = (sorted(part.to_plain()) for part in (window.columns[name], baseline.columns[name]))
        if now != before:
            parts = [" and ".join(part for part in ("values", "numbers", "lengths") if part in kind) for kind in (now, before)]
            raise DataError(f"{place}, feature {name!r}", expected=f"statistics with {parts[0]}", received=f"with {parts[1]}", fix=fix)


def _of_source(found: Statistics, source: ParquetSource, at_most: int) -> Statistics:
    if not found.rows and not at_most:
        raise source.nothing_left()
    return replace(found, data_fingerprint=source.fingerprint)


def _own_measures(window: Statistics, span: WindowConfig) -> Iterator[Measure]:
    """What needs no baseline."""
    for name, column in window.columns.items():
        for task, auc in zip(window.tasks, column.label_aucs(), strict=True):
            counted, rate = window.label_rate(task, window.labels)
            positives = counted * rate if counted else 0.0
            is_enough = min(positives, counted - positives) >= LEAST_LABELS
            if not math.isnan(auc):
                detail = f"alone it tells positives of {task} from negatives with an AUC of {auc:.3f}."
                yield Measure("leakage_auc", f"{name} for {task}", auc, detail, is_enough, column.feature)
    for check, counts, what in (("repeated_keys", window.row_keys, "have the key of"), ("repeated_rows", window.all_rows, "repeat")):
        if counts is not None and (check == "repeated_keys" or window.newest is not None):
            share = counts.repeated_share
            yield Measure(check, "rows", share, f"{share:.2%} of the {window.rows:,} rows {what} another row.")
    if window.days is not None:
        missing = _missing_days([*window.days.by_value()], span)
        if missing:
            named = ", ".join(missing[:5]) + (" and others" if len(missing) > 5 else "")
            yield Measure("missing_days", named, len(missing), f"{len(missing)} of the days of the window have no row: {named}.")
        else:
            yield Measure("missing_days", "rows", 0, "no day of the window is missing.")


def _missing_days(days: Sequence[str], span: WindowConfig) -> list[str]:
    """Calendar days between the first and the last, or those that the window names, that have no row."""
    known = [day for day in (*days, span.start, span.end) if _is_day(day)]
    if not known:
        return []
    first, last = datetime.date.fromisoformat(min(known)), datetime.date.fromisoformat(max(known))
    every = (first + datetime.timedelta(days=number) for number in range((last - first).days + 1))
    return [day.isoformat() for day in every if day.isoformat() not in days and span.holds(day.isoformat())]


def _is_day(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def _late_hours(window: Statistics, baseline: Statistics) -> Iterator[Measure]:
    earlier = hours_before_end(baseline)
    for day, hours in hours_before_end(window).items():
        if earlier:
            usual = max(earlier.values())
            detail = f"its newest event is {hours:.1f} hours before the end of the day in UTC, in the baseline at most {usual:.1f}."
            yield Measure("late_hours", day, max(hours - usual, 0.0), detail)


def hours_before_end(statistics: Statistics) -> dict[str, float]:
    """How long before its end each day falls silent; negative where the days are not those of UTC."""
    found = {}
    for day, newest in (statistics.newest or {}).items():
        if _is_day(day):
            end = datetime.datetime.combine(datetime.date.fromisoformat(day), datetime.time(), datetime.UTC).timestamp() + 24 * 3600
            found[day] = (end - newest / 1000) / 3600
    return found


def _label_rates(window: Statistics, baseline: Statistics | None, chance: Chance) -> Iterator[Measure]:
    """Over all and by segment against the baseline; each day against the baseline, or else against the other days."""
    earlier = baseline.labels if baseline is not None and baseline.tasks == window.tasks else None
    days = {} if window.days is None else window.days.by_value()
    for task in window.tasks:
        if earlier is not None:
            yield _label_rate("label_rate", task, task, window, window.labels, earlier, chance)
        for day, tallied in days.items() if len(days) > 1 else ():
            reference = window.labels - tallied if earlier is None else earlier
            yield _label_rate("label_rate", f"{task} on {day}", task, window, tallied, reference, chance)
        if earlier is None or baseline is None:
            continue
        for column, counts in (window.segments or {}).items():
            before = baseline.segments[column].by_value() if baseline.segments and column in baseline.segments else {}
            for value, tallied in counts.by_value().items():
                if value in before:
                    subject = f"{task} where {column}={value}"
                    yield _label_rate("label_rate_by_segment", subject, task, window, tallied, before[value], chance)


def _label_rate(check: str, subject: str, task: str, statistics: Statistics, now: Integers, before: Integers, chance: Chance) -> Measure:
    (counted, rate), (reference, usual) = statistics.label_rate(task, now), statistics.label_rate(task, before)
    if not counted or not reference:
        return Measure(check, subject, 0.0, f"no row that counts for {task}, or none to compare with.", False)
    change = abs(rate - usual) / usual if usual else (math.inf if rate else 0.0)
    is_beyond = chance.is_less_than(rate, counted, usual, reference)
    return Measure(check, subject, min(change, 1e9), f"{rate:.4%} of {counted:,} rows are positive, before it was {usual:.4%}.", is_beyond)


def _compared(name: str, now: ColumnStatistics, before: ColumnStatistics, chance: Chance) -> Iterator[Measure]:
    def measure(check: str, value: float, detail: str, is_beyond_chance: bool, part: str = "") -> Measure:
        return Measure(check, f"{name}{part}", value, detail, is_beyond_chance, now.feature)

    yield coverage_drop(name, now.feature, Covered(now.coverage, now.rows), Covered(before.coverage, before.rows), chance)
    if now.values is not None and before.values is not None:
        yield from _compared_values(now.values, before.values, chance, measure)
    for part, numbers, earlier in (("", now.numbers, before.numbers), (" (length)", now.lengths, before.lengths)):
        if numbers is not None and earlier is not None and numbers.count and earlier.count:
            weights = " (weight)" if now.values is not None and not part else part
            yield from _compared_numbers(numbers, earlier, chance, weights, measure)


_Measured = Callable[..., Measure]


def _compared_values(now: Counts, before: Counts, chance: Chance, measure: _Measured) -> Iterator[Measure]:
    level = max(now.level, before.level)
    now, before = now.at(level), before.at(level)
    total, earlier = now.num_kept, before.num_kept
    if not total or not earlier:
        return
    yield from _drift(*_value_parts(now, before), chance, "", measure)
    for check, one, other, size, other_size, where in (
        ("new_value", now, before, total, earlier, "not in the baseline"),
        ("lost_value", before, now, earlier, total, "in the baseline and not here"),
    ):
        is_only_here = ~np.isin(one.keys, other.keys)
        share, named = 0.0, "none"
        if is_only_here.any():
            place = int(np.argmax(np.where(is_only_here, one.tallies[:, 0], -1)))
            assert one.values is not None
            share, named = one.tallies[place, 0] / size, repr(one.values[place].as_py())
        all_share = one.tallies[is_only_here, 0].sum() / size
        detail = f"{named} is {share:.2%} of the values and {where}; all such values together are {all_share:.2%}."
        yield measure(check, share, detail, chance.is_less_than(share, size, 0.0, other_size))
        if check == "new_value":
            yield measure("unseen_ids", all_share, detail, chance.is_less_than(all_share, size, 0.0, other_size))


def _compared_numbers(now: Numbers, before: Numbers, chance: Chance, part: str, measure: _Measured) -> Iterator[Measure]:
    total, earlier = now.count, before.count
    yield from _drift(*_number_parts(now, before), chance, part, measure)
    keys = np.union1d(now.bins.keys, before.bins.keys)
    distance = float(np.abs(_cumulative(now, keys) - _cumulative(before, keys)).max())
    detail = f"median {now.quantile(0.5):.4g} instead of {before.quantile(0.5):.4g}, mean {now.mean:.4g} instead of {before.mean:.4g}."
    yield measure("kolmogorov_smirnov", distance, detail, distance > chance.distance(total, earlier), part)
    outside = _outside(now, before)
    detail = f"{outside:.2%} are outside of [{before.low:.6g}, {before.high:.6g}]; the numbers are in [{now.low:.6g}, {now.high:.6g}]."
    yield measure("out_of_range", outside, detail, chance.is_less_than(outside, total, 1 / earlier, earlier), part)


def _drift(names: Sequence[str], now: Floats, before: Floats, chance: Chance, part: str, measure: _Measured) -> Iterator[Measure]:
    """``names``, ``now``, ``before``: the parts that the values are divided into, and how many of both are in each."""
    shares, usual = _smoothed(now), _smoothed(before)
    stability = _stability(now, before)
    middle = (shares + usual) / 2
    divergence = float((shares * np.log2(shares / middle) + usual * np.log2(usual / middle)).sum() / 2)
    least = chance.stability(len(names), now.sum(), before.sum())
    place = int(np.argmax(np.abs(shares - usual)))
    detail = f"{names[place]} are {shares[place]:.2%} of the values, before it was {usual[place]:.2%}."
    yield measure("psi", stability, detail, stability > least, part)
    yield measure("jensen_shannon", divergence, detail, stability > least, part)


def _stability(now: Floats, before: Floats) -> float:
    shares, usual = _smoothed(now), _smoothed(before)
    return float(((shares - usual) * np.log(shares / usual)).sum())


def _value_parts(now: Counts, before: Counts) -> tuple[list[str], Floats, Floats]:
    """The frequent values of the baseline, and all others."""
    assert before.values is not None
    places = np.flatnonzero(before.tallies[:, 0] >= LEAST_SHARE * before.num_kept)
    names = [*(repr(before.values[int(place)].as_py()) for place in places), "rare ones" if len(places) else "all"]

    def split(counts: Counts) -> Floats:
        found = dict(zip(counts.keys.tolist(), counts.tallies[:, 0].tolist(), strict=True))
        named = [found.get(key, 0) for key in before.keys[places].tolist()]
        return np.array([*named, counts.num_kept - sum(named)], np.float64)

    return names, split(now), split(before)


def _number_parts(now: Numbers, before: Numbers) -> tuple[list[str], Floats, Floats]:
    """The tenths of the baseline, as far as its bins tell them apart."""
    reached = np.cumsum(before.bins.tallies[:, 0]) / before.count
    edges = np.unique(before.bins.keys[np.searchsorted(reached, np.arange(1, 10) / 10)])
    ends = [f"{bin_centre(int(edge)):.3g}" for edge in edges]
    names = [f"numbers up to {ends[0]}", *(f"numbers from {low} to {high}" for low, high in pairwise(ends)), f"numbers above {ends[-1]}"]

    def split(numbers: Numbers) -> Floats:
        parts = np.searchsorted(edges, numbers.bins.keys)
        return np.bincount(parts, weights=numbers.bins.tallies[:, 0], minlength=len(names)).astype(np.float64)

    return names, split(now), split(before)


def _smoothed(counts: Floats) -> Floats:
    """Shares; half a row more in each part keeps logarithms finite."""
    smoothed: Floats = (counts + 0.5) / (counts.sum() + 0.5 * len(counts))
    return smoothed


def _cumulative(numbers: Numbers, keys: NDArray[np.uint64]) -> Floats:
    reached = np.concatenate([[0.0], np.cumsum(numbers.bins.tallies[:, 0]) / numbers.count])
    cumulative: Floats = reached[np.searchsorted(numbers.bins.keys, keys, side="right")]
    return cumulative


def _outside(now: Numbers, before: Numbers) -> float:
    """Share of the numbers in bins beyond the outermost ones of the baseline: at most 2 % outside does not count."""
    counts, keys = now.bins.tallies[:, 0], now.bins.keys
    beyond = int(counts[(keys < before.bins.keys[0]) | (keys > before.bins.keys[-1])].sum())
    return beyond / now.count
