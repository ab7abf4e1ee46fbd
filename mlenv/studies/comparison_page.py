"""One HTML page per comparison of two models: what can be told, every seed as a dot, the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlenv.config import MONITORS
from mlenv.pages.charts import Chart, Series, dot_chart
from mlenv.pages.page import Cell, Table, render
from mlenv.pages.report import METRICS
from mlenv.studies.seed_variance import Difference


@dataclass(frozen=True)
class ComparisonPage:
    """What there is to say about two models."""

    names: tuple[str, str]
    places: tuple[str, str]
    """Config file of each, or where its runs are."""
    seeds: tuple[Sequence[int], Sequence[int]]
    differences: Sequence[Difference]
    sentences: Sequence[str]
    confidence: float
    """Of all intervals together."""


def render_comparison(page: ComparisonPage) -> str:
    """The page as text; equal pages give equal texts."""
    return render(
        "studies/comparison.html.j2",
        page=page,
        found=[(sentence, "better" if one.is_real else "same") for one, sentence in zip(page.differences, page.sentences, strict=True)],
        facts=_facts(page),
        figures=_figures(page),
        dots=[_dots(page, one) for one in page.differences],
        is_paired=page.differences[0].is_paired,
        percent=f"{100 * page.confidence:.4g}",
        each=f"{100 * page.differences[0].confidence:.4g}",
    )


def _facts(page: ComparisonPage) -> dict[str, str]:
    facts = {name: place for name, place in zip(page.names, page.places, strict=True) if name != place}
    counts = {f"seeds of {name}": _seeds_text(seeds) for name, seeds in zip(page.names, page.seeds, strict=True)}
    return facts | ({"seeds": _seeds_text(page.seeds[0])} if page.seeds[0] == page.seeds[1] else counts)


def _seeds_text(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _title(metric: str) -> str:
    task, _, name = metric.rpartition("/")
    return f"{METRICS[name]}: {task}"


def _figures(page: ComparisonPage) -> Table:
    rows = []
    for one in page.differences:
        sides = [Cell(f"{np.mean(values):.5f}", [f"± {np.std(values, ddof=1):.5f}"]) for values in (one.first, one.second)]
        low, high = one.interval
        rows.append(
            [
                Cell(_title(one.metric)),
                *sides,
                Cell(f"{one.mean:+.5f}"),
                Cell(f"{low:+.5f} to {high:+.5f}"),
                Cell(f"{one.p_value:.2g}"),
                Cell(f"{one.visible:.2g}"),
                Cell("over 10,000" if one.seeds_needed is None else f"{one.seeds_needed:,}"),
            ]
        )
    first, second = page.names
    return Table(["Metric", first, second, "Difference", "Interval", "p", "Visible", "Seeds needed"], 1, rows)


def _dots(page: ComparisonPage, one: Difference) -> Chart:
    sides = (one.first, one.second)
    found = [value for values in sides for value in values]
    margin = 0.08 * ((max(found) - min(found)) or abs(found[0]) or 1.0)
    dots = [Series(name, [(value, row) for value in sides[row]], row, "dots") for row, name in enumerate(page.names)]
    means = [Series(name, [(float(np.mean(sides[row])), row)], row, "level") for row, name in enumerate(page.names)]
    better = "higher is better" if MONITORS[one.metric.rpartition("/")[2]] else "lower is better"
    chart = dot_chart(f"{_title(one.metric)} ({better})", page.names, [*dots, *means], (min(found) - margin, max(found) + margin))
    return replace(chart, legend=())  # the rows have the names
