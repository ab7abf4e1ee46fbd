"""One HTML page per comparison of two logs: which features differ, how much, and what has probably happened."""

from __future__ import annotations

from typing import Final

from mlenv.pages.charts import NEUTRAL, Chart, Series, dot_chart
from mlenv.pages.page import Cell, Table, render
from mlenv.robustness.skew import FeatureSkew, Skew

_MAX_CHARTED: Final = 20


def render_skew(skew: Skew) -> str:
    """The page as text; equal comparisons give equal texts."""
    facts = {
        "served": f"{skew.served}, {skew.num_served:,} rows",
        "logged": f"{skew.logged}, {skew.num_logged:,} rows",
        "rows of both": f"{skew.num_common:,}",
        "may differ": f"{skew.limit:.2%} of the rows",
    }
    return render(
        "robustness/skew.html.j2",
        skew=skew,
        facts=facts,
        mark="held" if skew.above else "pass",
        charts_of_shares=_charts(skew),
        features=_features(skew),
        findings=[(one, _detail(one)) for one in skew.above],
    )


def _detail(one: FeatureSkew) -> str:
    explained = f" ({one.explained:.0%} of them)" if one.explained else ""
    return f"{one.differs:.2%} of the rows differ, interval {one.low:.2%} to {one.high:.2%}: {one.guess}{explained}"


def _charts(skew: Skew) -> list[Chart]:
    shown = [one for one in skew.features if one.differs][:_MAX_CHARTED]
    if not shown:
        return []
    ends = [(end, row) for row, one in enumerate(shown) for end in (one.low, one.high)]
    series = [
        Series("interval", ends, NEUTRAL, "dots"),
        Series("rows that differ", [(one.differs, row) for row, one in enumerate(shown)], 0, "dots"),
        Series("limit", [(skew.limit, 0)], NEUTRAL, "level"),
    ]
    reach = 1.05 * max(one.high for one in shown)
    return [
        dot_chart("Share of the rows that differ", [one.feature for one in shown], series, (-0.02 * reach, max(reach, 1.1 * skew.limit)))
    ]


def _features(skew: Skew) -> Table:
    rows = [
        [
            Cell(one.feature),
            Cell(f"{one.guess} ({one.explained:.0%} of them)" if one.guess and one.explained else one.guess),
            Cell(one.kind),
            Cell(f"{one.differs:.2%}", [f"{one.low:.2%} to {one.high:.2%}"], "off" if one.is_above else ""),
            Cell("" if one.relative is None else f"{one.relative:.1%}"),
            Cell(f"{one.score:.4f}"),
        ]
        for one in skew.features
    ]
    header = ["Feature", "Probably", "Kind", "Rows that differ", "By, relative", "Score"]
    return Table(header, 2, rows)
