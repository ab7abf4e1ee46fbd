"""One HTML page per replay: how well the scores agree, where they do not, and the features behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mlenv.pages.charts import NEUTRAL, Chart, Series, dot_chart, line_chart
from mlenv.pages.page import Cell, Table, render
from mlenv.robustness.score_parity import Parity
from mlenv.robustness.score_replay import Replay

_MAX_CHARTED: Final = 20


def render_replay(found: Replay) -> str:
    """The page as text; equal replays give equal texts."""
    options = found.options
    facts = {
        "model": found.model,
        "logged scores": f"{found.log}, {found.num_logged:,} rows",
        "replayed on": f"{found.rows}, {found.num_replayed:,} rows",
        "rows compared": f"{found.num_common - found.num_without_score:,}",
    }
    if found.num_without_score:
        facts["rows without a logged score"] = f"{found.num_without_score:,}"
    facts["a difference"] = f"more than {options.tolerance:g} between two predictions"
    facts["may differ"] = f"{options.limit:.2%} of the rows"
    return render(
        "robustness/score_replay.html.j2",
        found=found,
        facts=facts,
        mark="held" if found.is_above else "pass",
        overall=_parity(found.overall, with_group=False),
        segments=_parity(found.segments),
        hours=_parity(found.hours),
        hour_charts=_hour_charts(found),
        blames=_blames(found),
        blame_charts=_blame_charts(found),
        worst=_worst(found),
    )


def _parity(parities: Sequence[Parity], *, with_group: bool = True) -> Table:
    rows = [
        [
            *([Cell(one.group)] if with_group else []),
            Cell(one.task),
            Cell(f"{one.num_rows:,}"),
            Cell(f"{one.differs:.2%}"),
            Cell(f"{one.logged:.5f}"),
            Cell(f"{one.replayed:.5f}", [f"{one.replayed - one.logged:+.5f}"]),
            Cell(f"{one.apart:.2e}"),
            Cell(f"{one.largest:.2e}"),
        ]
        for one in parities
    ]
    names = ["Where", "Task"] if with_group else ["Task"]
    figures = ["Rows", "Rows that differ", "Mean logged", "Mean replayed", "Mean difference, absolute", "Largest"]
    return Table([*names, *figures], len(names), rows)


def _hour_charts(found: Replay) -> list[Chart]:
    hours = list(dict.fromkeys(one.group for one in found.hours))
    if len(hours) < 2:
        return []
    tasks = list(dict.fromkeys(one.task for one in found.hours))
    series = [
        Series(task, [(hours.index(one.group), one.differs) for one in found.hours if one.task == task], color)
        for color, task in enumerate(tasks)
    ]
    return [
        line_chart("Share of the rows that differ, by hour (UTC)", series, "hour", from_zero=True, x_names=[hour[5:] for hour in hours])
    ]


def _blames(found: Replay) -> Table:
    rows = [
        [
            Cell(one.feature or "all features of the log"),
            Cell(one.task),
            Cell(f"{one.explained:.1%}"),
            Cell(f"{one.changed:.1%}"),
        ]
        for one in found.blames
    ]
    return Table(["Feature", "Task", "Explained", "Rows that it moves"], 2, rows)


def _blame_charts(found: Replay) -> list[Chart]:
    """The features that move a prediction, those that explain most first."""
    tasks = list(dict.fromkeys(one.task for one in found.blames))
    names = list(dict.fromkeys(one.feature for one in found.blames if one.feature and one.changed))[:_MAX_CHARTED]
    if not names:
        return []
    series = [
        Series(
            task,
            [(one.explained, names.index(one.feature)) for one in found.blames if one.task == task and one.feature in names],
            color,
            "dots",
        )
        for color, task in enumerate(tasks)
    ]
    series.append(Series("nothing", [(0.0, 0)], NEUTRAL, "level"))
    values = [one.explained for one in found.blames if one.feature in names]
    return [
        dot_chart(
            "Share of the difference that a feature explains", names, series, (min([*values, 0.0]) - 0.02, max([*values, 1.0]) + 0.02)
        )
    ]


def _worst(found: Replay) -> Table:
    rows = [
        [
            Cell(", ".join(f"{name} {value}" for name, value in one["key"].items())),
            Cell(one["task"]),
            Cell(f"{one['logged']:.5f}"),
            Cell(f"{one['replayed']:.5f}", [f"{one['replayed'] - one['logged']:+.5f}"]),
        ]
        for one in found.worst
    ]
    return Table(["Row", "Task", "Logged", "Replayed"], 2, rows)
