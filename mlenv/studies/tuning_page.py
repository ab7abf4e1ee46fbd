"""One HTML page per search: its best trial, what each value brought, all trials."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mlenv.config import TuningConfig
from mlenv.config.tuning import Choice, LogUniform
from mlenv.pages.charts import NEUTRAL, Chart, Series, dot_chart, line_chart, scatter_chart
from mlenv.pages.page import Cell, Table, render
from mlenv.pages.report import METRICS

_BEST, _FINISHED = 1, 0
_GROUPS = {_BEST: "best", _FINISHED: "finished", NEUTRAL: "others"}
_WORDS = {"running": "under way", "finished": "finished", "stopped": "stopped early", "failed": "failed"}


@dataclass(frozen=True)
class TrialRow:
    """A trial, as the page shows it."""

    number: int
    values: Mapping[str, object]
    state: str
    best: float | None
    evaluations: Sequence[float]
    seconds: float
    error: str


@dataclass(frozen=True)
class TuningPage:
    """What there is to say about a search."""

    title: str
    config: TuningConfig
    trials: Sequence[TrialRow]
    best: int | None
    """Number of the best trial that came to its end."""
    best_config: str
    """Where its config is."""


def render_tuning(page: TuningPage) -> str:
    """The page as text; equal pages give equal texts."""
    best = next((trial for trial in page.trials if trial.number == page.best), None)
    return render(
        "studies/tuning.html.j2",
        page=page,
        best=best,
        metric=_metric(page),
        facts=_facts(page, best),
        curves=_curves(page),
        values=[_value_chart(page, key) for key in page.config.space] if any(trial.best is not None for trial in page.trials) else [],
        trials=_table(page),
        failed=[trial for trial in page.trials if trial.error],
    )


def value_text(value: object) -> str:
    """A value of a key, short: a mapping by its kind and what follows, such as ``cross_net, num_layers 2``."""
    if isinstance(value, dict):
        kind = [value["kind"]] if "kind" in value else []
        return ", ".join([*kind, *(f"{key} {value_text(entry)}" for key, entry in value.items() if key != "kind")])
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _metric(page: TuningPage) -> str:
    task, _, name = page.config.metric.rpartition("/")
    return f"{METRICS[name]}: {task}"


def _facts(page: TuningPage, best: TrialRow | None) -> dict[str, str]:
    config = page.config
    counts = {word: sum(trial.state == state for trial in page.trials) for state, word in _WORDS.items()}
    facts = {"trials": f"{len(page.trials)} of {config.num_trials}"} | {word: str(count) for word, count in counts.items() if count}
    facts |= {"evaluations": str(sum(len(trial.evaluations) for trial in page.trials)), "base config": config.config}
    facts |= {"drawn by": config.search, "seed": str(config.seed)}
    return facts | ({"best config": page.best_config} if best is not None else {})


def _curves(page: TuningPage) -> list[Chart]:
    """The metric of every trial, evaluation by evaluation."""
    series = [
        Series(f"trial {trial.number}", list(enumerate(trial.evaluations, start=1)), _color(page, trial), "dots")
        for trial in sorted(page.trials, key=partial(_drawn_last, page))
        if trial.evaluations
    ]
    if not series:
        return []
    shown = sorted({_color(page, trial) for trial in page.trials if trial.evaluations}, reverse=True)
    return [
        replace(line_chart("By evaluation", series, "evaluation"), legend=[Series(_GROUPS[color], (), color, "dots") for color in shown])
    ]


def _value_chart(page: TuningPage, key: str) -> Chart:
    """The metric over the values of one key."""
    space = page.config.space[key]
    groups: dict[int, list[tuple[TrialRow, float]]] = {_BEST: [], _FINISHED: [], NEUTRAL: []}
    for trial in page.trials:
        if trial.best is not None:
            groups[_color(page, trial)].append((trial, trial.best))
    groups = {color: trials for color, trials in reversed(groups.items()) if trials}  # the best is drawn last
    if isinstance(space, Choice):
        rows = {
            color: [(figure, float(space.values.index(trial.values[key]))) for trial, figure in trials] for color, trials in groups.items()
        }
        figures = [figure for points in rows.values() for figure, _ in points]
        margin = 0.06 * ((max(figures) - min(figures)) or 1.0)
        series = [Series(_GROUPS[color], points, color, "dots") for color, points in rows.items()]
        return dot_chart(key, [_row_name(value) for value in space.values], series, (min(figures) - margin, max(figures) + margin))
    is_log = isinstance(space, LogUniform)
    return scatter_chart(
        key,
        [
            Series(_GROUPS[color], [(_place(trial.values[key], is_log=is_log), figure) for trial, figure in trials], color, "dots")
            for color, trials in groups.items()
        ],
        is_log=is_log,
    )


def _row_name(value: object) -> str:
    """A value in the room that a chart has for it: of a mapping the kind and the values, without their keys."""
    if not isinstance(value, dict):
        return value_text(value)
    return " ".join([str(value.get("kind", "")), *(value_text(entry) for key, entry in value.items() if key != "kind")]).strip()


def _place(value: object, *, is_log: bool) -> float:
    assert isinstance(value, int | float)
    return math.log10(value) if is_log else float(value)


def _color(page: TuningPage, trial: TrialRow) -> int:
    return _BEST if trial.number == page.best else _FINISHED if trial.state == "finished" else NEUTRAL


def _drawn_last(page: TuningPage, trial: TrialRow) -> tuple[bool, bool]:
    return trial.number == page.best, trial.state == "finished"


def _table(page: TuningPage) -> Table:
    """The best trials first."""
    keys, sign = list(page.config.space), -1 if page.config.higher_is_better else 1

    def order(trial: TrialRow) -> tuple[bool, bool, float, int]:
        return trial.number != page.best, trial.state != "finished", sign * (trial.best or 0.0), trial.number

    rows = [
        [
            Cell(f"{trial.number}"),
            *(Cell(value_text(trial.values[key])) for key in keys),
            Cell("—" if trial.best is None else f"{trial.best:.5f}"),
            Cell(f"{len(trial.evaluations)}"),
            Cell(f"{trial.seconds:,.0f}" if trial.seconds else "—"),
            Cell(_WORDS[trial.state], css="off" if trial.state == "failed" else ""),
        ]
        for trial in sorted(page.trials, key=order)
    ]
    return Table(["Trial", *keys, _metric(page), "Evaluations", "Seconds", "State"], 1 + len(keys), rows)
