"""One HTML page per promotion: what was decided and why, every difference with its interval, every gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mlenv.models.gates import FIXES, Figure, GateVerdict, Judgement, Loss
from mlenv.pages.charts import NEUTRAL, Chart, Series, dot_chart
from mlenv.pages.page import Cell, Table, render
from mlenv.pages.report import METRICS

WORDS: Final = {
    "promoted": "promoted: it passed all gates",
    "forced": "promoted by force: the gates would have held it",
    "held": "held: the champion stays",
    "trial": "nothing moved: this was a trial",
}
"""What was decided, for people."""

_MAX_CHARTED: Final = 20


@dataclass(frozen=True, kw_only=True)
class PromotionPage:
    """What there is to say about a challenger."""

    title: str
    facts: dict[str, str]
    """What was compared with what; shown as it is."""
    decision: str
    """A key of ``WORDS``."""
    verdict: GateVerdict
    figures: Sequence[Figure]
    losses: Sequence[Loss]


def render_promotion(page: PromotionPage) -> str:
    """The page as text; equal pages give equal texts."""
    gates = {gate: [one for one in page.verdict.judgements if one.gate == gate] for gate in FIXES}
    return render(
        "models/promotion.html.j2",
        page=page,
        words=WORDS[page.decision],
        mark="pass" if page.verdict.is_passed else "held",
        failures=[(one, FIXES[one.gate]) for one in page.verdict.failures],
        gates=_gates(gates),
        charts_of_gains=gain_charts(page.figures, "champion"),
        figures=figures_table(page.figures, "Challenger", "Champion"),
        losses=_losses(page.losses),
    )


def _gates(gates: dict[str, list[Judgement]]) -> Table:
    rows = []
    for gate, judged in gates.items():
        failed = sum(not one.is_passed for one in judged)
        verdict = Cell("not judged") if not judged else Cell("held", css="off") if failed else Cell("pass")
        rows.append([Cell(gate), verdict, Cell(f"{len(judged)}"), Cell(f"{failed}")])
    return Table(["Gate", "Verdict", "Judged", "Failed"], 1, rows)


def gain_charts(figures: Sequence[Figure], other: str) -> list[Chart]:
    """For each metric the gain of each task and segment, as three dots: the ends of the interval and the middle."""
    charts = []
    for metric in dict.fromkeys(figure.metric for figure in figures):
        of_metric = [figure for figure in figures if figure.metric == metric and figure.gain is not None]
        shown = sorted(of_metric, key=lambda figure: (bool(figure.segment), figure.gain_high or 0.0))[:_MAX_CHARTED]
        if not shown:
            continue
        ends = [(end, row) for row, figure in enumerate(shown) for end in (figure.gain_low, figure.gain_high) if end is not None]
        middles = [(figure.gain, row) for row, figure in enumerate(shown) if figure.gain is not None]
        reach = 1.1 * max([abs(value) for value, _ in ends], default=1.0) or 1.0
        names = [_lines(figure) for figure in shown]
        series = [
            Series("interval", ends, NEUTRAL, "dots"),
            Series("gain", middles, 0, "dots"),
            Series(other, [(0.0, 0)], NEUTRAL, "level"),
        ]
        charts.append(dot_chart(f"{METRICS[metric]}: gain over the {other}", names, series, (-reach, reach)))
    return charts


def _lines(figure: Figure) -> str:
    """Task and segment as a chart has room for them: the value on a line of its own, for it is what tells rows apart."""
    column, _, value = figure.segment.partition("=")
    return f"{figure.task}, {column}\n{value}" if value else figure.task


def figures_table(figures: Sequence[Figure], one: str, other: str) -> Table:
    """Every figure with its interval, beside that of the other model."""
    rows = []
    for figure in figures:
        against = [Cell(""), Cell(""), Cell("")]
        if figure.champion is not None and figure.gain is not None:
            css = "off" if figure.gain_high is not None and figure.gain_high < 0 else ""
            against = [
                Cell(f"{figure.champion:.5f}"),
                Cell(f"{figure.gain:+.5f}", css=css),
                Cell(f"{figure.gain_low:+.5f} to {figure.gain_high:+.5f}"),
            ]
        rows.append(
            [
                Cell(METRICS[figure.metric]),
                Cell(f"{figure.task} {figure.segment}".strip()),
                Cell(f"{figure.value:.5f}", [f"{figure.low:.5f} to {figure.high:.5f}"]),
                *against,
            ]
        )
    return Table(["Metric", "Task and segment", one, other, "Gain", "Interval of the gain"], 2, rows)


def _losses(losses: Sequence[Loss]) -> Table:
    rows = [
        [
            Cell(loss.features),
            Cell(loss.task),
            Cell(f"{loss.whole:.5f}"),
            Cell(f"{loss.without:.5f}", [f"{-loss.loss:+.5f}"]),
            Cell("" if loss.champion is None else f"{loss.champion:.5f}"),
        ]
        for loss in losses
    ]
    return Table(["Missing", "Task", "AUC", "Without", "Champion without"], 2, rows)
