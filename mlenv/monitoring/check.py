"""Holds what a model sees now against what it saw when it was tested, and to the limits of its ``checks``."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mlenv.checks.findings import Chance, Measure, Verdict
from mlenv.checks.validation import validate_statistics
from mlenv.checks.validation_page import ValidationPage, render_validation
from mlenv.inference.stored_scorer import HeldOut, StoredScorer
from mlenv.monitoring.observation import Observation, observe
from mlenv.monitoring.scores import ScoreCounts, cumulative, distance, in_parts, stability
from mlenv.pages.charts import NEUTRAL, Chart, Series, line_chart
from mlenv.pages.page import write_whole

MONITOR_FILE: Final = "monitor.json"
MONITOR_PAGE: Final = "monitor.html"
LEAST_POSITIVES: Final = 20
"""Positive labels without which a calibration says nothing."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One check of a model in use."""

    verdict: Verdict
    now: Observation
    reference: Observation
    at: datetime.datetime
    facts: dict[str, str]

    def write(self, folder: Path, scorer: StoredScorer) -> None:
        """``monitor.json`` and ``monitor.html``; the folder's parent exists."""
        folder.mkdir(exist_ok=True)
        page = ValidationPage(
            self.facts["model"],
            self.facts,
            self.verdict,
            self.now.statistics,
            self.reference.statistics,
            scorer.schema,
            kind="A model in use",
            scores=[_score_chart(task, counts, self.reference.scores[task]) for task, counts in self.now.scores.items()],
        )
        write_whole(json.dumps(self.facts | self.verdict.to_plain(), indent=2), folder / MONITOR_FILE)
        write_whole(render_validation(page), folder / MONITOR_PAGE)


def check_model(
    name: str, scorer: StoredScorer, rows: HeldOut, reference: Observation, at: datetime.datetime, *, has_labels: bool = True
) -> Checked:
    """
    Args:
        name: of the model, for people.
        at: when; ages are counted until then.

    Raises:
        DataError, Problems: there is no row, or a column that the model reads is not there.
    """
    now = observe(scorer, rows, has_labels=has_labels)
    measures = [*_scores(now, reference, scorer.sections.checks.significance), *_ages(now, scorer, at)]
    verdict = validate_statistics(now.statistics, reference.statistics, scorer.schema, scorer.sections.checks, rows.window, measures)
    means = {
        f"mean prediction of {task}": f"{counts.mean:.5f}, was {reference.scores[task].mean:.5f}" for task, counts in now.scores.items()
    }
    facts = {"model": name, "checked": f"{at:%Y-%m-%d %H:%M} UTC", "rows": f"{now.statistics.rows:,} of {now.window}"}
    facts |= {"reference": f"{reference.statistics.rows:,} of {reference.window}", **means}
    return Checked(verdict=verdict, now=now, reference=reference, at=at, facts=facts)


def _score_chart(task: str, now: ScoreCounts, before: ScoreCounts) -> Chart:
    sides = (("reference", before, NEUTRAL), ("now", now, 0))
    series = [Series(name, [*zip(*cumulative(counts), strict=True)], color, "line") for name, counts, color in sides]
    return line_chart(task, series, "prediction", y_range=(0.0, 1.0))


def _scores(now: Observation, reference: Observation, significance: float) -> Iterator[Measure]:
    chance = Chance(significance, max(side.statistics.rows_per_request for side in (now, reference)))
    for task, counts in now.scores.items():
        before = reference.scores[task]
        parts = in_parts(counts, before)
        moved, luck = stability(*parts), chance.stability(len(parts[0]), counts.rows, before.rows)
        means = f"the mean prediction is {counts.mean:.5f}, it was {before.mean:.5f}."
        yield Measure(
            "score_psi", task, moved, f"a stability index of {moved:.3f}, of which chance makes {luck:.3f}; {means}", moved > luck
        )
        apart, luck = distance(counts, before), chance.distance(counts.rows, before.rows)
        yield Measure(
            "score_distance", task, apart, f"the distributions are {apart:.3f} apart, of which chance makes {luck:.3f}.", apart > luck
        )
        if counts.positives:
            yield _calibration(task, counts, significance)


def _calibration(task: str, counts: ScoreCounts, significance: float) -> Measure:
    """Labels vary about their expectation by no more than its root, as rare events do."""
    off = abs(counts.calibration - 1)
    luck = significance * math.sqrt(counts.expected) / counts.positives
    detail = f"predictions sum to {counts.calibration:.3f} of the labels, of which chance makes {luck:.3f}."
    return Measure("score_calibration", task, off, detail, counts.positives >= LEAST_POSITIVES and off > luck)


def _ages(now: Observation, scorer: StoredScorer, at: datetime.datetime) -> Iterator[Measure]:
    if (newest := _newest(now)) is not None:
        hours = max((at - newest).total_seconds() / 3600, 0.0)
        yield Measure("data_age_hours", "rows", hours, f"the newest is of {newest:%Y-%m-%d %H:%M} UTC, {hours:.1f} hours ago.")
    if end := scorer.sections.data.train.end:
        days = max((at - _end_of(end)).total_seconds() / 86_400, 0.0)
        yield Measure("model_age_days", "model", days, f"it was trained on days until {end}, {days:.1f} days ago.")


def _newest(now: Observation) -> datetime.datetime | None:
    if now.statistics.newest:
        return datetime.datetime.fromtimestamp(max(now.statistics.newest.values()) / 1000, datetime.UTC)
    days = [] if now.statistics.days is None else [day for day in now.statistics.days.by_value() if _is_day(day)]
    return _end_of(max(days)) if days else None


def _is_day(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def _end_of(day: str) -> datetime.datetime:
    return datetime.datetime.combine(datetime.date.fromisoformat(day), datetime.time(), datetime.UTC) + datetime.timedelta(days=1)
