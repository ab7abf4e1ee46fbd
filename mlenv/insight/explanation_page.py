"""One HTML page per explanation: importance with its intervals, by segment, single predictions, tables. A model card shows parts of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mlenv.insight.importance import CONFIDENCE, Importance
from mlenv.pages.charts import NEUTRAL, Chart, Series, dot_chart
from mlenv.pages.page import Cell, Table, render
from mlenv.pages.report import METRICS

if TYPE_CHECKING:
    import pyarrow as pa

    from mlenv.insight.embedding_health import TableHealth
    from mlenv.insight.explanation import Insight

_MAX_CHARTED: Final = 25
_MAX_LOCAL: Final = 20
_MAX_NAMED: Final = 6


@dataclass(frozen=True, kw_only=True)
class ExplanationPage:
    """What there is to say about what a model goes by."""

    title: str
    insight: Insight
    healths: Sequence[TableHealth]
    local: pa.Table | None


@dataclass(frozen=True)
class ImportanceView:
    """Importance as the pages show it."""

    charts: list[Chart]
    tables: list[tuple[str, Table]]
    """By task."""
    segments: list[tuple[str, Table]]
    """By task and column."""
    estimate: str
    """How far the one-pass estimate can be trusted, in a sentence."""
    notes: Sequence[str]
    percent: str


@dataclass(frozen=True)
class _LocalRow:
    key: str
    task: str
    label: str
    prediction: str
    logit: str
    parts: Sequence[tuple[str, str]]
    """Feature with what it adds, and whether that is more or less."""
    rest: str


def render_explanation(page: ExplanationPage) -> str:
    """The page as text; equal pages give equal texts."""
    insight = page.insight
    facts = {
        "rows": f"{insight.num_rows:,} of {insight.rows.path}, {insight.rows.window}",
        "permutations": f"{insight.seconds[0]:.1f} s",
        "one pass": f"{insight.seconds[1]:.1f} s",
    }
    local, gap = ([], "") if page.local is None else _local(page.local)
    return render(
        "insight/explanation.html.j2",
        page=page,
        facts=facts,
        importance=importance_view(insight),
        local=local,
        gap=gap,
        num_local=0 if page.local is None else page.local.num_rows,
        health=health_table(page.healths) if page.healths else None,
    )


def importance_view(insight: Insight) -> ImportanceView:
    """Charts and tables of what is lost, the most important first."""
    found = insight.importances
    overall = [one for one in found if not one.segment]
    tasks = list(dict.fromkeys(one.task for one in overall))
    segments = {
        f"{task}, by {column}": _segment_table([one for one in found if one.task == task and one.segment.startswith(f"{column}=")], overall)
        for task in tasks
        for column in dict.fromkeys(one.segment.partition("=")[0] for one in found if one.segment)
    }
    return ImportanceView(
        charts=[_chart(task, [one for one in overall if (one.task, one.metric) == (task, "auc")]) for task in tasks],
        tables=[(task, _table([one for one in overall if one.task == task], insight.estimates.get(task, {}))) for task in tasks],
        segments=[(title, table) for title, table in segments.items() if table.rows],
        estimate=_estimate_text(insight),
        notes=insight.notes,
        percent=f"{100 * CONFIDENCE:.4g}",
    )


def health_table(healths: Sequence[TableHealth]) -> Table:
    """One row for each embedding table."""
    header = [
        "Table",
        "Rows",
        "Norms of trained rows",
        "Never trained",
        "Dead",
        "Used here",
        "Lookups of the top 1\N{NO-BREAK SPACE}%",
        "Lookups of untrained rows",
    ]
    rows = [
        [
            Cell(one.table),
            Cell(f"{one.num_rows:,}", [f"{one.dim} wide"]),
            Cell(
                "—" if math.isnan(one.norms[1]) else f"{one.norms[1]:.3g}",
                [] if math.isnan(one.norms[1]) else [f"{one.norms[0]:.2g} to {one.norms[2]:.3g}"],
            ),
            Cell(f"{one.untrained:.1%}"),
            Cell(f"{one.dead:.1%}", css="off" if one.dead > 0.01 else ""),
            Cell(f"{one.used:.1%}", [f"{one.lookups:,} lookups"]),
            Cell(f"{one.top:.1%}"),
            Cell(f"{one.unseen:.1%}", css="off" if one.unseen > 0.05 else ""),
            Cell("—")
            if one.ids is None or one.colliding is None
            else Cell(f"{one.colliding:.1%}", [f"of {one.ids:,} ids"], "off" if one.colliding > 0.2 else ""),
        ]
        for one in healths
    ]
    return Table([*header, "Ids that share a row"], 1, rows)


def _chart(task: str, of_task: Sequence[Importance]) -> Chart:
    shown = sorted(of_task, key=lambda one: (-one.is_group, -one.loss))[:_MAX_CHARTED]
    ends = [(end, row) for row, one in enumerate(shown) for end in (one.low, one.high)]
    finite = [value for value, _ in ends if math.isfinite(value)] + [one.loss for one in shown]
    low, high = min(0.0, *finite), max(0.0, *finite)
    margin = 0.05 * (high - low) or 0.01
    series = [
        Series("interval", ends, NEUTRAL, "dots"),
        Series("lost", [(one.loss, row) for row, one in enumerate(shown)], 0, "dots"),
        Series("nothing", [(0.0, 0)], NEUTRAL, "level"),
    ]
    return dot_chart(f"{task}: {METRICS['auc']} lost", [one.feature for one in shown], series, (low - margin, high + margin))


def _table(of_task: Sequence[Importance], estimates: dict[str, float]) -> Table:
    by_feature: dict[str, dict[str, Importance]] = {}
    for one in of_task:
        by_feature.setdefault(one.feature, {})[one.metric] = one
    order = sorted(by_feature.values(), key=lambda metrics: (metrics["auc"].is_group, -metrics["auc"].loss))
    ranks = {name: rank for rank, name in enumerate(sorted(estimates, key=lambda name: -estimates[name]), start=1)}
    rows = []
    for metrics in order:
        name = metrics["auc"].feature
        cells = [_loss_cell(metrics[metric]) for metric in ("auc", "normalized_entropy")]
        estimate = Cell(f"{estimates[name]:.3f}", [f"rank {ranks[name]}"]) if name in estimates else Cell("")
        rows.append([Cell(name), *cells, estimate])
    return Table(["Feature", f"{METRICS['auc']} lost", f"{METRICS['normalized_entropy']} added", "One pass: mean size in logits"], 1, rows)


def _loss_cell(one: Importance) -> Cell:
    interval = [] if math.isnan(one.low) else [f"{one.low:+.4f} to {one.high:+.4f}"]
    return Cell(f"{one.loss:+.4f}", interval)


def _segment_table(found: Iterable[Importance], overall: Sequence[Importance]) -> Table:
    by_place = {(one.feature, one.segment): one for one in found if one.metric == "auc"}
    segments = list(dict.fromkeys(segment for _, segment in by_place))
    tasks = {one.task for one in by_place.values()}
    of_all = {one.feature: one for one in overall if one.metric == "auc" and one.task in tasks}
    features = sorted(of_all, key=lambda name: (of_all[name].is_group, -of_all[name].loss))
    rows = [[Cell(name), _loss_cell(of_all[name]), *(_loss_cell(by_place[name, segment]) for segment in segments)] for name in features]
    return Table([f"{METRICS['auc']} lost", "all rows", *(segment.partition("=")[2] for segment in segments)], 1, rows if segments else [])


def _estimate_text(insight: Insight) -> str:
    if not insight.estimates:
        return "This model has no Representation, so that there is no one-pass estimate."
    told = [f"{value:.2f} for {task}" for task, value in insight.correlations.items() if math.isfinite(value)]
    return f"Its ranks correlate with those of the lost AUC by {', '.join(told)} (Spearman)." if told else ""


def _local(table: pa.Table) -> tuple[list[_LocalRow], str]:
    rows = table.to_pylist()
    shown = [_local_row(row) for row in _by_example(rows)[:_MAX_LOCAL]]
    return shown, f"{max(row['gap'] for row in rows):.1e}"


def _by_example(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tasks of one example under each other; the table has the examples of one task after those of another."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    of_task = [[row for row in rows if row["task"] == task] for task in tasks]
    return [row for example in zip(*of_task, strict=True) for row in example]


def _local_row(row: dict[str, Any]) -> _LocalRow:
    added = {name.removeprefix("attribution_"): value for name, value in row.items() if name.startswith("attribution_")}
    order = sorted(added, key=lambda name: -abs(added[name]))
    names = list(row)
    return _LocalRow(
        key=", ".join(f"{row[name]}" for name in names[: names.index("task")][:1]),
        task=row["task"],
        label="—" if row["label"] is None else f"{row['label']:.0f}",
        prediction=f"{row['prediction']:.4f}",
        logit=f"{row['baseline_logit']:+.2f} → {row['logit']:+.2f}",
        parts=[(f"{name} {added[name]:+.2f}", "more" if added[name] > 0 else "less") for name in order[:_MAX_NAMED]],
        rest=f"{sum(added[name] for name in order[_MAX_NAMED:]):+.2f}",
    )
