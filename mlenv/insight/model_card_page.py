"""The page of a model card: what the model is for, what it was made of, how good it is and for whom, and what it should not be used for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mlenv.inference.stored_scorer import HeldOut
from mlenv.insight.embedding_health import TableHealth
from mlenv.insight.explanation import Insight
from mlenv.insight.explanation_page import health_table, importance_view
from mlenv.insight.model_origin import Origin
from mlenv.kinds import kind_of
from mlenv.loops.metrics import ReliabilityCurve
from mlenv.models.gates import Figure, Loss
from mlenv.pages.charts import NEUTRAL, Chart, Series, dot_chart, reliability_chart
from mlenv.pages.page import Cell, Table, render
from mlenv.pages.report import METRICS, format_figure
from mlenv.schema import FEATURES, Schema
from mlenv.schema import Sequence as SequenceFeature

_SHOWN: Final = ("auc", "grouped_auc", "normalized_entropy", "calibration", "base_rate", "examples")
_OF_SEGMENTS: Final = ("auc", "normalized_entropy", "calibration", "base_rate", "examples")
_MAX_CHARTED: Final = 20
_TOLD_ELSEWHERE: Final = (
    "name",
    "step",
    "image",
    "checkpoint fingerprint",
    "teacher",
    "teacher version",
    "warm start",
    "warm start version",
)


@dataclass(frozen=True, kw_only=True)
class CardPage:
    """What there is to say about a stored model."""

    title: str
    name: str
    """What led to it."""
    notes: str
    """What it is meant for; empty where nobody said."""
    schema: Schema
    origin: Origin
    rows: HeldOut
    """What it was measured on."""
    num_rows: int
    num_bytes: int
    metrics: Mapping[str, float]
    figures: Sequence[Figure]
    confidence: float
    """Of all intervals over all rows together, and of all by segment."""
    reliability: Mapping[str, ReliabilityCurve]
    """By task."""
    insight: Insight
    losses: Sequence[Loss]
    missing_share: float
    healths: Sequence[TableHealth]
    limits: Sequence[str]
    written: str


@dataclass(frozen=True)
class _Segment:
    column: str
    charts: Sequence[Chart]
    table: Table


def render_card(page: CardPage) -> str:
    """The page as text; equal pages give equal texts."""
    return render(
        "insight/model_card.html.j2",
        page=page,
        notes=_paragraphs(page.notes),
        facts=_facts(page),
        data=_data(page),
        rows_text=f"{page.num_rows:,} rows of {page.rows.path}, {page.rows.window}",
        percent=f"{100 * page.confidence:.4g}",
        quality=_quality(page),
        reliability=[
            reliability_chart(task, curve, color) for color, (task, curve) in enumerate(page.reliability.items()) if curve.weights
        ],
        segments=[_segment(page, column) for column in page.schema.segments],
        importance=importance_view(page.insight),
        importance_rows=f"{page.insight.num_rows:,}",
        losses=_losses(page.losses),
        missing=f"{page.missing_share:.0%}",
        health=health_table(page.healths) if page.healths else None,
        features=_features(page),
        lineage=_lineage(page.origin),
        moves=_moves(page.origin),
    )


def _paragraphs(notes: str) -> list[tuple[str, str]]:
    """Headings and paragraphs: ``h3`` or ``p``, and the text."""
    parts = []
    for block in notes.replace("\r\n", "\n").split("\n\n"):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        while lines and lines[0].startswith("#"):
            parts.append(("h3", lines.pop(0).lstrip("# ")))
        if lines:
            parts.append(("p", " ".join(lines)))
    return parts


def _facts(page: CardPage) -> dict[str, str]:
    model = page.origin.config.get("model") or {}
    facts = {
        "model": page.name,
        "version": str(page.origin.version) if page.origin.version is not None else "not registered",
        "tasks": ", ".join(page.schema.tasks),
        "kind": str(model.get("kind", "")),
        "size": f"{page.num_bytes / 1e6:,.1f} MB of parameters",
        "trained": f"{page.origin.step:,} steps",
        "fingerprint": page.origin.fingerprint,
        "card written": page.written,
    }
    return {name: text for name, text in facts.items() if text}


def _data(page: CardPage) -> Table | None:
    record = page.origin.record
    if record is None:
        return None
    rows = []
    for name, window in record.windows.items():
        days = f"{window.days[0]} to {window.days[-1]}" if window.days else str(window.window)
        notes = [f"{len(window.passed_over)} files or row groups passed over"] if window.passed_over else []
        rows.append(
            [
                Cell(name),
                Cell(days, notes),
                Cell(
                    f"{window.num_rows:,}", [] if window.num_rows == window.num_stored_rows else [f"of {window.num_stored_rows:,} stored"]
                ),
                Cell(f"{len(window.files):,}", [f"{window.num_bytes / 1e6:,.1f} MB"]),
                Cell(window.fingerprint),
            ]
        )
    return Table(["Window", "Days", "Rows", "Files", "Fingerprint"], 1, rows)


def _quality(page: CardPage) -> Table:
    shown = [metric for metric in _SHOWN if any(f"{task}/{metric}" in page.metrics for task in page.schema.tasks)]
    rows = [[Cell(task), *(_figure(page, task, metric, "") for metric in shown)] for task in page.schema.tasks]
    return Table(["Task", *(METRICS[metric] for metric in shown)], 1, rows)


def _figure(page: CardPage, task: str, metric: str, segment: str) -> Cell:
    """A metric with its interval, where that could be measured."""
    value = page.metrics.get(f"{task}/{metric}" + (f"@{segment}" if segment else ""), math.nan)
    one = _found(page, task, metric, segment)
    notes = [] if one is None else [f"{format_figure(metric, one.low)} to {format_figure(metric, one.high)}"]
    off = metric == "calibration" and one is not None and (one.low > 1.1 or one.high < 0.9)
    return Cell(format_figure(metric, value), notes, "off" if off else "")


def _found(page: CardPage, task: str, metric: str, segment: str) -> Figure | None:
    return next((one for one in page.figures if (one.task, one.metric, one.segment) == (task, metric, segment)), None)


def _segment(page: CardPage, column: str) -> _Segment:
    sizes: dict[str, float] = {}
    for key, value in page.metrics.items():
        figure, _, segment = key.partition("@")
        if segment.startswith(f"{column}=") and figure.endswith("/examples"):
            sizes[segment] = max(sizes.get(segment, 0.0), value)
    segments = sorted(sizes, key=lambda segment: (-sizes[segment], segment))
    rows = [
        [
            Cell(segment.partition("=")[2] if task == page.schema.tasks[0] else ""),
            Cell(task),
            *(_figure(page, task, metric, segment) for metric in _OF_SEGMENTS),
        ]
        for segment in segments
        for task in page.schema.tasks
    ]
    table = Table([column, "Task", *(METRICS[metric] for metric in _OF_SEGMENTS)], 2, rows)
    charts = [chart for metric in ("auc", "calibration") for task in page.schema.tasks if (chart := _chart(page, metric, task, segments))]
    return _Segment(column, charts, table)


def _chart(page: CardPage, metric: str, task: str, segments: Sequence[str]) -> Chart | None:
    """One task's figures with the ends of their intervals, by the values that have one."""
    found = [one for segment in segments if (one := _found(page, task, metric, segment)) is not None][:_MAX_CHARTED]
    if not found:
        return None
    ends = [(end, row) for row, one in enumerate(found) for end in (one.low, one.high)]
    color, overall = page.schema.tasks.index(task), page.metrics.get(f"{task}/{metric}", math.nan)
    is_calibration = metric == "calibration"
    level = Series("calibrated", [(1.0, 0)], NEUTRAL, "level") if is_calibration else Series("all rows", [(overall, 0)], color, "level")
    values = [value for value, _ in ends] + [level.points[0][0]]
    margin = 0.05 * (max(values) - min(values)) or 0.01
    series = [
        Series("interval", ends, NEUTRAL, "dots"),
        Series(task, [(one.value, row) for row, one in enumerate(found)], color, "dots"),
        level,
    ]
    names = [one.segment.partition("=")[2] for one in found]
    return dot_chart(f"{METRICS[metric]}: {task}", names, series, (min(values) - margin, max(values) + margin))


def _losses(losses: Sequence[Loss]) -> Table:
    rows = [
        [Cell(loss.features), Cell(loss.task), Cell(f"{loss.whole:.4f}"), Cell(f"{loss.without:.4f}"), Cell(f"{-loss.loss:+.4f}")]
        for loss in losses
    ]
    return Table(["Missing", "Task", "AUC", "AUC without", "Difference"], 2, rows)


def _features(page: CardPage) -> Table:
    coverage = page.origin.statistics.coverage if page.origin.statistics is not None else {}
    tables: dict[str, list[str]] = {}
    for key in page.schema.sparse_keys:
        tables.setdefault(key.feature, []).append(key.table)
    rows = [
        [
            Cell(name),
            Cell((kind_of(feature, FEATURES) or "") + (f", at most {feature.max_length}" if isinstance(feature, SequenceFeature) else "")),
            Cell(feature.entity + (", core" if feature.core else "")),
            Cell(", ".join(tables.get(name, ()))),
            Cell(feature.owner),
            Cell(f"{coverage[name]:.1%}" if name in coverage else "—"),
        ]
        for name, feature in page.schema.features.items()
    ]
    return Table(["Feature", "Kind", "Of", "Table", "Owner", "Coverage"], 5, rows)


def _lineage(origin: Origin) -> dict[str, str]:
    facts: dict[str, str] = {}
    if origin.registered is not None:
        aliases = ", ".join(f"{alias}: version {version}" for alias, version in sorted(origin.registered.aliases.items()))
        facts[f"aliases of {origin.registered.name}"] = aliases or "none"
    facts |= {"teacher": "none", "warm start": "none"} | dict(origin.lineage)
    if origin.run_id:
        facts["run"] = origin.run_id
    if image := (origin.config.get("job") or {}).get("image"):
        facts["image"] = str(image)
    return facts | {name: text for name, text in origin.facts.items() if name not in _TOLD_ELSEWHERE}


def _moves(origin: Origin) -> Table | None:
    if origin.registered is None or not origin.registered.moves:
        return None
    rows = [
        [Cell(f"{move.number}"), Cell(move.when), Cell(f"version {move.version}"), Cell(move.kind), Cell(move.who), Cell(move.why)]
        for move in reversed(origin.registered.moves)
    ]
    return Table(["Move", "When", "Version", "What", "Who", "Why"], 6, rows)
