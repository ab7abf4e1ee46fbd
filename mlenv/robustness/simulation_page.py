"""One HTML page per simulation: how stable the model is by feature, and every effect."""

from __future__ import annotations

from collections.abc import Sequence

from mlenv.pages.charts import NEUTRAL, Chart, Series, dot_chart
from mlenv.pages.page import Cell, Table, render
from mlenv.robustness.corruptions import MEANINGS
from mlenv.robustness.simulation import Effect, Simulation


def render_simulation(simulation: Simulation) -> str:
    """The page as text; equal simulations give equal texts."""
    options = simulation.options
    facts = {
        "model": simulation.model,
        "rows": f"{simulation.num_rows:,} of {simulation.rows}",
        "rows hit": f"{options.share:.0%}, drawn with seed {options.seed}",
        "rows of the days before": f"{simulation.num_earlier:,}",
    }
    meanings: dict[str, str] = {kind: meaning for kind, meaning in MEANINGS.items() if kind in options.kinds}
    if any(effect.kind == "missing at peak" for effect in simulation.effects):
        meanings |= {"missing at peak": f"null in all rows of the {options.peak_hours} hours of the day (UTC) with the most rows"}
    return render(
        "robustness/simulation.html.j2",
        simulation=simulation,
        facts=facts,
        meanings=meanings,
        whole=_whole(simulation),
        stability_charts=[_stability_chart(simulation)] if simulation.stability else [],
        stability=_stability(simulation),
        groups=_effects([effect for effect in simulation.effects if effect.is_group]),
        effects=_effects([effect for effect in simulation.effects if not effect.is_group]),
    )


def _whole(simulation: Simulation) -> Table:
    rows = [
        [Cell(task), Cell(f"{figures['auc']:.5f}"), Cell(f"{figures['normalized_entropy']:.5f}"), Cell(f"{figures['calibration']:.4f}")]
        for task, figures in simulation.whole.items()
    ]
    return Table(["Task", "AUC", "Normalized entropy", "Calibration"], 1, rows)


def _stability_chart(simulation: Simulation) -> Chart:
    scores = simulation.stability
    dots = [Series("stability", [(score, row) for row, score in enumerate(scores.values())], 0, "dots")]
    dots.append(Series("indifferent", [(1.0, 0)], NEUTRAL, "level"))
    low, high = min([*scores.values(), 0.999]), max([*scores.values(), 1.0])
    margin = 0.05 * (high - low)
    return dot_chart("Stability by feature", list(scores), dots, (low - margin, high + margin))


def _stability(simulation: Simulation) -> Table:
    tasks = list(simulation.whole)
    found = {(effect.subject, effect.task): effect for effect in simulation.effects if effect.kind == "missing" and not effect.is_group}
    rows = []
    for feature, score in simulation.stability.items():
        effects = [found[feature, task] for task in tasks]
        rows.append([Cell(feature), Cell(f"{score:.4f}"), *(_change(effect) for effect in effects)])
    return Table(["Feature", "Stability", *(f"AUC of {task}" for task in tasks)], 1, rows)


def _effects(effects: Sequence[Effect]) -> Table:
    rows = [
        [
            Cell(effect.subject),
            Cell(effect.kind),
            Cell(effect.task),
            Cell(f"{effect.reached:.1%}"),
            Cell(f"{effect.move:.5f}", [f"{effect.relative_move:.1%}"]),
            _change(effect),
            Cell(f"{effect.entropy_change:+.5f}"),
            Cell(f"{effect.calibration:.4f}"),
        ]
        for effect in sorted(effects, key=lambda effect: effect.auc_change)
    ]
    header = ["What", "Corruption", "Task", "Rows reached", "Move of the prediction", "AUC", "Normalized entropy", "Calibration"]
    return Table(header, 3, rows)


def _change(effect: Effect) -> Cell:
    """Marked where the interval has no 0 in it."""
    css = "off" if effect.auc_high < 0 else ""
    return Cell(f"{effect.auc_change:+.5f}", [f"{effect.auc_low:+.5f} to {effect.auc_high:+.5f}"], css)
