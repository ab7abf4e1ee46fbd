"""A comparison of two models, for people: text, one HTML page, JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mlenv.models.promotion_page import figures_table, gain_charts
from mlenv.offline.model_pair import ModelPair
from mlenv.pages.page import render, write_whole

PAGE: Final = "comparison.html"
DOCUMENT: Final = "comparison.json"


def pair_text(pair: ModelPair) -> str:
    """A line for each metric over all rows, and for each segment in which the difference is sure."""
    lines = []
    for figure in pair.figures:
        value = f"{figure.subject}: {figure.value:.5f}"
        if figure.champion is None or figure.gain is None:
            lines.append(f"{value}, which only the second has")
            continue
        is_sure = (figure.gain_low or 0.0) > 0 or (figure.gain_high or 0.0) < 0
        if is_sure or not figure.segment:
            word = ("better" if figure.gain > 0 else "worse") if is_sure else "no sure difference"
            interval = f"{figure.gain_low:+.5f} to {figure.gain_high:+.5f}"
            lines.append(f"{value} instead of {figure.champion:.5f}: gain {figure.gain:+.5f}, interval {interval}; {word}")
    lines += [f"{task}: only the first has it" for task in pair.lost_tasks]
    return "\n".join(lines)


def write_pair(pair: ModelPair, facts: Mapping[str, str], folder: Path) -> Path:
    """Writes page and figures, and returns the path of the page."""
    folder.mkdir(exist_ok=True)
    document = {**facts, "lost_tasks": list(pair.lost_tasks), "figures": [dataclasses.asdict(figure) for figure in pair.figures]}
    write_whole(json.dumps(document, indent=2), folder / DOCUMENT)
    page = render(
        "offline/model_pair.html.j2",
        facts=facts,
        charts_of_gains=gain_charts(pair.figures, "first"),
        figures=figures_table(pair.figures, "Second", "First"),
        lost_tasks=pair.lost_tasks,
    )
    write_whole(page, folder / PAGE)
    return folder / PAGE
