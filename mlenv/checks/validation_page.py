"""One HTML page per validation: what was found, and what the window holds beside its baseline."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlenv.checks.backfill_checks import Side
from mlenv.checks.findings import SEVERITIES, Finding, Verdict
from mlenv.checks.validation import hours_before_end
from mlenv.datasets.agreement import Agreement
from mlenv.datasets.counts import Counts, Integers, Numbers
from mlenv.datasets.statistics import ColumnStatistics, Statistics
from mlenv.datasets.vocabulary import collision_shares
from mlenv.pages.charts import NEUTRAL, Chart, Series, dot_chart
from mlenv.pages.page import Cell, Table, render
from mlenv.schema import Schema

_MAX_CHARTS = 12
_MAX_VALUES = 12
_MAX_DAYS = 31
_MAX_SEGMENTS = 10
_NUM_TOP = 3


@dataclass(frozen=True)
class ValidationPage:
    """What there is to say about a window."""

    title: str
    facts: dict[str, str]
    """What was compared with what; shown as it is."""
    verdict: Verdict
    window: Statistics
    baseline: Statistics | None
    schema: Schema
    sides: tuple[Side, Side] | None = None
    """The back-filled days, and the logged ones; where days were compared."""
    pairs: Mapping[str, Agreement] = field(default_factory=dict)
    """By back-filled column, how far it agrees with the logged one."""
    logged: Mapping[str, str] = field(default_factory=dict)
    """By back-filled column, the name of the logged one."""
    kind: str = "Validation of data"
    """What the page is, for people."""
    scores: Sequence[Chart] = ()
    """How a model's predictions are distributed, where they were judged too."""


def render_validation(page: ValidationPage) -> str:
    """The page as text; equal pages give equal texts."""
    return render(
        "checks/validation.html.j2",
        page=page,
        distributions=_distributions(page),
        labels=_label_charts(page),
        coverage=[_coverage_chart(page)],
        backfilled=_sides(page),
        pairs=_pairs(page),
        features=_features(page),
        days=_days(page),
        segments=_segments(page),
        tables=_tables(page),
    )


def _distributions(page: ValidationPage) -> list[Chart]:
    """Features with a finding, the worst first, beside the baseline."""
    charts: dict[str, Chart] = {}
    for finding in page.verdict.raised:
        name = finding.subject.split(" ")[0]
        column = page.window.columns.get(name)
        before = page.baseline.columns.get(name) if page.baseline is not None else None
        if column is not None and name not in charts and len(charts) < _MAX_CHARTS:
            charts[name] = _distribution(name, column, before)
    return list(charts.values())


def _distribution(name: str, now: ColumnStatistics, before: ColumnStatistics | None) -> Chart:
    if now.values is not None:
        return _beside(name, *_value_shares(now.values, before.values if before is not None else None))
    assert now.numbers is not None
    return _beside(name, *_number_shares(now.numbers, before.numbers if before is not None else None))


def _beside(title: str, names: Sequence[str], now: Sequence[float], before: Sequence[float] | None) -> Chart:
    series = [] if before is None else [Series("baseline", [(share, row) for row, share in enumerate(before)], NEUTRAL, "dots")]
    series.append(Series("window", [(share, row) for row, share in enumerate(now)], 0, "dots"))
    high = max([*now, *(before or ())], default=0.0)
    return dot_chart(f"{title}: share of the values", names, series, (0.0, high * 1.05 or 1.0))


def _value_shares(now: Counts, before: Counts | None) -> tuple[list[str], list[float], list[float] | None]:
    """The most frequent values of both."""
    parts = [part for part in (before, now) if part is not None]
    values = list(dict.fromkeys(value for part in parts for value, _ in part.top(_MAX_VALUES)))
    shares = []
    for part in parts:
        counts = {value: tallied[0] for value, tallied in part.by_value().items()}
        shares.append([float(counts.get(value, 0) / max(part.num_kept, 1)) for value in values])
    return [str(value) for value in values], shares[-1], shares[0] if before is not None else None


def _number_shares(now: Numbers, before: Numbers | None) -> tuple[list[str], list[float], list[float] | None]:
    """Tenths of the baseline, or of the window itself, as far as they differ, and what lies beyond."""
    reference = before if before is not None and before.count else now
    edges = sorted({reference.low, *(reference.quantile(tenth / 10) for tenth in range(1, 10)), reference.high} if reference.count else {})
    names = [f"below {edges[0]:.4g}", *(f"to {edge:.4g}" for edge in edges[1:]), f"above {edges[-1]:.4g}"] if edges else []

    def shares(numbers: Numbers) -> list[float]:
        keys, counts = numbers.bins.keys, numbers.bins.tallies[:, 0]
        ends = np.array([_key_of(edge) for edge in edges], np.uint64)
        parts = np.searchsorted(ends[1:], keys)
        parts[keys < ends[0]] = -1
        split = np.bincount(parts + 1, weights=counts, minlength=len(names))
        return [float(share) for share in split[: len(names)] / max(numbers.count, 1)]

    return names, shares(now) if edges else [], shares(before) if before is not None and edges else None


def _key_of(edge: float) -> int:
    return int(Numbers.of(np.array([edge]), []).bins.keys[0])


def _label_charts(page: ValidationPage) -> list[Chart]:
    """The label rate of each day, of the baseline and of the window."""
    found = []
    for number, task in enumerate(page.window.tasks):
        days: list[tuple[str, str, float]] = []
        for name, part in (("baseline", page.baseline), ("window", page.window)):
            if part is not None and part.days is not None and task in part.tasks:
                days += [(name, day, part.label_rate(task, tallied)[1]) for day, tallied in part.days.by_value().items()]
        days = sorted((entry for entry in days if not math.isnan(entry[2])), key=lambda entry: entry[1])[-_MAX_DAYS:]
        if days:
            series = [
                Series(name, [(rate, row) for row, (part, _, rate) in enumerate(days) if part == name], color, "dots")
                for name, color in (("baseline", NEUTRAL), ("window", number))
            ]
            high = max(rate for _, _, rate in days) * 1.1 or 1.0
            found.append(dot_chart(f"{task} by day", [day for _, day, _ in days], [entry for entry in series if entry.points], (0.0, high)))
    return found


def _coverage_chart(page: ValidationPage) -> Chart:
    coverage = page.window.coverage
    names = sorted(coverage, key=lambda name: (coverage[name], name))
    before = page.baseline.coverage if page.baseline is not None else {}
    series = [
        Series("baseline", [(before[name], row) for row, name in enumerate(names) if name in before], NEUTRAL, "dots"),
        Series("window", [(coverage[name], row) for row, name in enumerate(names)], 0, "dots"),
    ]
    return dot_chart("Share of the rows that have the feature", names, [entry for entry in series if entry.points], (0.0, 1.0))


def _sides(page: ValidationPage) -> Table:
    """Feature by feature, the back-filled days beside the logged ones; the worst first."""
    if page.sides is None:
        return Table([], 1, [])
    tasks = page.window.tasks
    header = ["Feature", "Verdict", "Coverage", "logged", "PSI", "KS"]
    header += [name for task in tasks for name in (f"AUC for {task}", "logged")]
    found: dict[str, list[Finding]] = {name: [] for name in page.window.columns}
    for finding in page.verdict.findings:
        if (name := finding.subject.split(" ")[0]) in found:
            found[name].append(finding)
    rows = []
    for name in sorted(found, key=lambda name: min((SEVERITIES.index(finding.severity) for finding in found[name]), default=2)):
        figures = [Cell(f"{side.statistics.columns[name].coverage:.2%}") for side in page.sides]
        for check in ("psi", "kolmogorov_smirnov"):
            values = [finding.value for finding in found[name] if finding.check == check]
            figures.append(Cell(f"{max(values):.3f}" if values else ""))
        for auc in (side.aucs.get((name, task)) for task in tasks for side in page.sides):
            figures.append(Cell("") if auc is None else Cell(f"{auc.mean:.3f}", [f"highest {auc.highest.auc:.3f}", auc.highest.day]))
        raised = [finding for finding in found[name] if finding.severity != "pass"]
        checks = list(dict.fromkeys(finding.check.replace("_", " ") for finding in raised))
        verdict = Cell(raised[0].severity if raised else "pass", checks)
        rows.append([Cell(name), verdict, *figures])
    return Table(header, 1, rows)


def _pairs(page: ValidationPage) -> Table:
    header = ["Back-filled", "Logged", "Rows with both", "Differ", "Worst day", "Coverage", "logged", "Mean difference", "Correlation"]
    ids = {key.column for key in page.schema.sparse_keys}
    rows = []
    for name, pair in page.pairs.items():
        day, worst = pair.worst_day
        coverage = [f"{there / pair.rows:.2%}" for there in (pair.first, pair.second)]
        numbers = ["", ""]
        if pair.moments.count and not {name, page.logged[name]} & ids:
            means = pair.moments.means
            numbers = [f"{means[0] - means[1]:.4g}", "" if math.isnan(pair.moments.correlation) else f"{pair.moments.correlation:.4f}"]
        figures = [f"{pair.num_both:,}", f"{pair.differing_share:.2%}", f"{worst:.2%} on {day}" if day else "", *coverage, *numbers]
        rows.append([Cell(name), Cell(page.logged[name]), *map(Cell, figures)])
    return Table(header, 2, rows)


def _days(page: ValidationPage) -> Table:
    """Rows, label rates and how far the newest event lies from the day's end: whether the day is complete."""
    window = page.window
    header = ["Day", "Rows", *window.tasks, "Newest event, UTC", "Hours before the end"]
    hours, newest, rows = hours_before_end(window), window.newest or {}, []
    for day, tallied in (window.days.by_value() if window.days is not None else {}).items():
        event = "" if day not in newest else f"{datetime.datetime.fromtimestamp(newest[day] / 1000, datetime.UTC):%Y-%m-%d %H:%M:%S}"
        late = f"{hours[day]:.1f}" if day in hours else ""
        rows.append([Cell(day), Cell(f"{tallied[0]:,}"), *_rates(window, tallied), Cell(event), Cell(late)])
    return Table(header, 1, rows)


def _segments(page: ValidationPage) -> Table:
    """The label rates of each segment, the most frequent first, over those of the baseline."""
    before = page.baseline.segments or {} if page.baseline is not None and page.baseline.tasks == page.window.tasks else {}
    rows = []
    for column, counts in (page.window.segments or {}).items():
        usual = before[column].by_value() if column in before else {}
        rows += [
            [Cell(f"{column}={str(value)[:24]}"), Cell(f"{tallied[0]:,}"), *_rates(page.window, tallied, usual.get(value))]
            for value, tallied in counts.top(_MAX_SEGMENTS)
        ]
    return Table(["Segment", "Rows", *page.window.tasks], 1, rows)


def _rates(statistics: Statistics, tallied: Integers, before: Integers | None = None) -> list[Cell]:
    """The label rate of each task."""
    cells = []
    for task in statistics.tasks:
        rate, usual = (math.nan if part is None else statistics.label_rate(task, part)[1] for part in (tallied, before))
        notes = [] if math.isnan(usual) else [f"before {usual:.2%}"]
        cells.append(Cell("" if math.isnan(rate) else f"{rate:.2%}", notes))
    return cells


def _features(page: ValidationPage) -> Table:
    header = [
        "Feature",
        "Coverage",
        "Distinct",
        "Least",
        "5 %",
        "Median",
        "95 %",
        "Greatest",
        "Mean",
        "Deviation",
        "Length",
        "Most frequent",
    ]
    rows = []
    for name, column in page.window.columns.items():
        numbers, lengths = column.numbers, column.lengths
        spread = (
            []
            if numbers is None or not numbers.count
            else [numbers.low, *map(numbers.quantile, (0.05, 0.5, 0.95)), numbers.high, numbers.mean, numbers.deviation]
        )
        figures = [Cell(f"{figure:.4g}") for figure in spread] or [Cell("")] * 7
        distinct = "" if column.values is None else f"{'about ' if column.values.level else ''}{column.values.num_distinct:,}"
        missing = {"null": column.nulls, "empty": column.empty, "NaN or infinite": column.not_finite}
        coverage = Cell(f"{column.coverage:.2%}", [f"{number:,} {name}" for name, number in missing.items() if number])
        length = Cell("")
        if lengths is not None and lengths.count:
            length = Cell(f"{lengths.mean:.2f}", [f"median {lengths.quantile(0.5):.0f}", f"at most {lengths.high:.0f}"])
        rows.append([Cell(name), coverage, Cell(distinct), *figures, length, _top(column)])
    return Table(header, 1, rows)


def _top(column: ColumnStatistics) -> Cell:
    if column.values is None:
        return Cell("")
    total = max(column.values.num_kept, 1)
    notes = [f"{str(value)[:24]}: {tallied[0] / total:.1%}" for value, tallied in column.values.top(_NUM_TOP)]
    return Cell(notes[0] if notes else "", notes=notes[1:])


def _tables(page: ValidationPage) -> Table:
    shares = collision_shares(page.window, page.schema)
    rows = [
        [Cell(name), Cell(f"{page.schema.tables[name].num_embeddings:,}"), Cell(f"{distinct:,}"), Cell(f"{share:.2%}")]
        for name, (distinct, share) in shares.items()
    ]
    return Table(["Table", "Rows", "Distinct ids", "Ids that share a row"], 1, rows)
