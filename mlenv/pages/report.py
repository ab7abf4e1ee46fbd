"""One self-contained HTML page per run: figures, learning curves, calibration, segments, coverage. It opens without a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlenv.pages.charts import NEUTRAL, Chart, Series, dot_chart, line_chart, reliability_chart
from mlenv.pages.page import Cell, Table, render, write_whole

if TYPE_CHECKING:
    from mlenv.loops.metrics import ReliabilityCurve

METRICS = {
    "auc": "AUC",
    "grouped_auc": "Grouped AUC",
    "normalized_entropy": "Normalized entropy",
    "log_loss": "Log loss",
    "calibration": "Calibration",
    "ece": "ECE",
    "base_rate": "Base rate",
    "examples": "Examples",
}
"""What the tables show, in this order, and the words for it."""

_FORMATS = {"examples": "{:,.0f}", "base_rate": "{:.3%}", "calibration": "{:.3f}"}
_MAX_CHARTED_VALUES = 20


@dataclass(frozen=True)
class Report:
    """What there is to say about a run. Any part may be empty."""

    title: str
    facts: dict[str, str]
    """What identifies the run: data window, revision, fingerprints, versions; shown as they are."""
    tasks: tuple[str, ...]
    metrics: dict[str, float]
    """``task/metric`` and ``task/metric@column=value``, as ``BinaryMetrics.compute`` gives them."""
    best: dict[str, float]
    """The best reachable values of the same keys, where they are known."""
    reliability: dict[str, ReliabilityCurve]
    """By task."""
    uncalibrated: dict[str, float]
    """Metrics before calibration, of the tasks that are calibrated."""
    reliability_before: dict[str, ReliabilityCurve]
    """Before calibration, of the same tasks."""
    history: list[dict[str, float]]
    """The journal of the run: ``step`` and any of ``train/task/loss``, ``validation/task/metric``, ``train/examples_per_second``."""
    coverage: dict[str, float]
    """Share of the training examples in which each feature is neither null nor empty."""
    artifacts: dict[str, str]
    """Where the files of the run are, by name."""


@dataclass(frozen=True)
class _Segment:
    column: str
    charts: Sequence[Chart]
    table: Table
    note: str


def write_report(report: Report, path: Path) -> None:
    """Writes the page whole or not at all."""
    write_whole(render_report(report), path)


def render_report(report: Report) -> str:
    """The page as text; equal reports give equal pages."""
    shown = [metric for metric in METRICS if any(f"{task}/{metric}" in report.metrics for task in report.tasks)]
    return render(
        "pages/report.html.j2",
        report=report,
        summary=_summary(report, shown),
        learning=list(_learning_charts(report)),
        reliability=[
            reliability_chart(task, curve, color, report.reliability_before.get(task))
            for color, task in enumerate(report.tasks)
            if (curve := report.reliability.get(task)) is not None and curve.weights
        ],
        segments=[_segment(report, shown, column, values) for column, values in _segment_values(report).items()],
        coverage=sorted(report.coverage.items(), key=lambda item: (item[1], item[0])),
        throughput=_throughput(report),
    )


def format_figure(metric: str, value: float) -> str:
    """A metric as the report shows it; a dash for nan."""
    if math.isnan(value):
        return "—"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return _FORMATS.get(metric, "{:.4f}").format(value)


def _summary(report: Report, shown: Sequence[str]) -> Table:
    rows = []
    for task in report.tasks:
        cells = [Cell(task)]
        for metric in shown:
            best = report.best.get(f"{task}/{metric}") if metric in ("auc", "grouped_auc", "normalized_entropy", "log_loss") else None
            notes = _before(report, task, metric)
            notes += [] if best is None or math.isnan(best) else [f"best {format_figure(metric, best)}"]
            cells.append(_figure(metric, report.metrics.get(f"{task}/{metric}", math.nan), notes))
        rows.append(cells)
    return Table(["Task", *(METRICS[metric] for metric in shown)], 1, rows)


def _before(report: Report, task: str, key: str) -> list[str]:
    """What a metric that calibration is about was without it."""
    metric = key.partition("@")[0]
    value = report.uncalibrated.get(f"{task}/{key}", math.nan)
    return [] if math.isnan(value) or metric in ("auc", "base_rate", "examples") else [f"before {format_figure(metric, value)}"]


def _figure(metric: str, value: float, notes: Sequence[str] = ()) -> Cell:
    off = metric == "calibration" and not math.isnan(value) and not 0.9 <= value <= 1.1
    return Cell(format_figure(metric, value), notes, "off" if off else "")


def _learning_charts(report: Report) -> Iterable[Chart]:
    for color, task in enumerate(report.tasks):
        series = [
            Series("training", _curve(report, f"train/{task}/loss"), NEUTRAL),
            Series("validation", _curve(report, f"validation/{task}/log_loss"), color, "dots"),
        ]
        if any(entry.points for entry in series):
            yield line_chart(f"Log loss: {task}", series, "step")
    for metric in ("auc", "grouped_auc", "normalized_entropy", "calibration"):
        series = []
        for color, task in enumerate(report.tasks):
            points = _curve(report, f"validation/{task}/{metric}")
            best = report.best.get(f"{task}/{metric}", math.nan)
            series.append(Series(task, points, color, "dots"))
            if points and metric in ("auc", "normalized_entropy") and not math.isnan(best):
                series.append(Series(f"{task}, best on test", [(0, best)], color, "level"))
        if any(entry.points for entry in series):
            yield line_chart(f"Validation: {METRICS[metric]}", series, "step")


def _throughput(report: Report) -> list[Chart]:
    points = _curve(report, "train/examples_per_second")
    return [line_chart("Training", [Series("rows per second", points, 0)], "step", from_zero=True)] if points else []


def _curve(report: Report, key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in report.history if math.isfinite(line.get(key, math.nan))]


def _segment_values(report: Report) -> dict[str, list[str]]:
    """Values of each segment column, those with the most examples of the first task that has any first."""
    columns: dict[str, dict[str, float]] = {}
    for key, value in report.metrics.items():
        figure, at, segment = key.partition("@")
        if at and figure.endswith("/examples"):
            column, _, name = segment.partition("=")
            sizes = columns.setdefault(column, {})
            sizes[name] = max(sizes.get(name, 0.0), value)
    return {column: sorted(sizes, key=lambda name: (-sizes[name], name)) for column, sizes in columns.items()}


def _segment(report: Report, shown: Sequence[str], column: str, values: Sequence[str]) -> _Segment:
    def figure(task: str, metric: str, value: str) -> float:
        return report.metrics.get(f"{task}/{metric}@{column}={value}", math.nan)

    charted = values[:_MAX_CHARTED_VALUES]
    charts = []
    for metric in ("calibration", "auc"):
        dots = [
            Series(task, [(figure(task, metric, value), row) for row, value in enumerate(charted)], color, "dots")
            for color, task in enumerate(report.tasks)
        ]
        levels = [
            Series(f"{task}, all rows", [(report.metrics.get(f"{task}/{metric}", math.nan), 0)], color, "level")
            for color, task in enumerate(report.tasks)
        ]
        found = [x for series in (*dots, *levels) for x, _ in series.points if math.isfinite(x)]
        if metric == "calibration":
            levels = [Series("calibrated", [(1.0, 0)], NEUTRAL, "level")]
            bounds = (max(0.0, min([0.9, *found]) - 0.05), min(3.0, max([1.1, *found]) + 0.05))
        else:
            levels = [series for series in levels if math.isfinite(series.points[0][0])]
            bounds = (max(0.0, min([0.7, *found]) - 0.01), min(1.0, max([0.7, *found]) + 0.01))
        charts.append(dot_chart(f"{METRICS[metric]} by {column}", charted, [*dots, *levels], bounds))
    rows = [
        [
            Cell(value if task == report.tasks[0] else ""),
            Cell(task),
            *(_figure(metric, figure(task, metric, value), _before(report, task, f"{metric}@{column}={value}")) for metric in shown),
        ]
        for value in values
        for task in report.tasks
    ]
    table = Table([column, "Task", *(METRICS[metric] for metric in shown)], 2, rows)
    note = f"The charts show the {len(charted)} largest of {len(values)} values." if len(values) > len(charted) else ""
    return _Segment(column, charts, table, note)
