"""Whether a challenger may become champion: what was measured, held to ``GatesConfig``. No file, no model, no clock is touched here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np

from mlenv.checks.findings import Verdict
from mlenv.config import BoundsConfig, GatesConfig
from mlenv.models.bootstrap import Floats, Ints, Resampled, TaskRows, resample, spread

NO_DIFFERENCE: Final = "no difference beyond noise"

FIXES: Final = {
    "limits": "train a better model, or set gates.limits to what is good enough",
    "calibration": "add a calibrator for the task (calibration), with the segment among its segments, and train again",
    "regression": "find what the model lost: its features, its rows, its training; gates.margins says what counts as lost",
    "gain": "keep the champion, or set gates.needs_gain to false where a model that is as good is wanted",
    "data": "mlenv validate says more about these rows; train on newer ones",
    "cost": "make the model smaller, or raise the limit in gates",
    "export": "mlenv export says more; write the model so that it can be exported, or set gates.export to null",
    "missing features": "train with feature dropout, or raise the limit in gates",
}
"""What to do about a gate that is not passed."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One thing that a gate looked at."""

    gate: str
    """A key of ``FIXES``."""
    subject: str
    is_passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class GateVerdict:
    """All that the gates looked at."""

    judgements: Sequence[Judgement]

    @property
    def failures(self) -> list[Judgement]:
        return [one for one in self.judgements if not one.is_passed]

    @property
    def is_passed(self) -> bool:
        return not self.failures

    def to_plain(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"verdict": "pass" if self.is_passed else "held", "judgements": [asdict(one) for one in self.judgements]}


@dataclass(frozen=True)
class SegmentColumn:
    """Which value of a segment column each row has."""

    values: Sequence[str]
    codes: Ints
    """``(rows,)``, places in ``values``."""


@dataclass(frozen=True, kw_only=True)
class PairedRows:
    """What two models, or the first one alone, said of the same rows."""

    tasks: Mapping[str, TaskRows]
    """By task, the rows that count for it. The first predictions are the challenger's; a task that the champion has not has no others."""
    segments: Mapping[str, Mapping[str, SegmentColumn]]
    """By task and column, of the same rows."""
    lost_tasks: Sequence[str] = ()
    """That the champion has and the challenger has not."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One metric of a task, over all rows or a segment of them."""

    task: str
    metric: str
    segment: str
    """``column=value``; empty for all rows."""
    value: float
    """The challenger's."""
    low: float
    high: float
    """Interval of the value."""
    champion: float | None = None
    gain: float | None = None
    """By how much the challenger is better; of a calibration, by how much its logarithm is nearer to 0."""
    gain_low: float | None = None
    gain_high: float | None = None
    """Interval of the gain."""

    @property
    def subject(self) -> str:
        return f"{self.task}/{self.metric}" + (f"@{self.segment}" if self.segment else "")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model takes to serve."""

    milliseconds: float
    """For 1,000 rows."""
    bytes: int
    """Of parameters and buffers, or of the exported graph with all that is in it."""
    form: str = "as trained"
    """What was measured, in words."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """AUC of the models when features are missing from some of the rows."""

    features: str
    """What was taken away, in words."""
    task: str
    whole: float
    """The challenger's AUC with them."""
    without: float
    """And without."""
    champion: float | None
    """The champion's without; None when it has no such task or features, or there is no champion."""

    @property
    def loss(self) -> float:
        return self.whole - self.without


def measure(rows: PairedRows, config: GatesConfig, *, seed: int = 0) -> list[Figure]:
    """Every compared metric with its interval, over all rows and by segment."""
    overall, by_segment = [], []
    for task, task_rows in rows.tasks.items():
        overall.append((task, "", resample(task_rows, np.zeros(len(task_rows.labels), np.int64), 1, num_draws=config.resamples, seed=seed)))
        for column, values in rows.segments.get(task, {}).items():
            names, groups = _judged_segments(task_rows, values, config.least_labels)
            if names:
                kept = groups >= 0
                found = resample(task_rows.where(kept), groups[kept], len(names), num_draws=config.resamples, seed=seed)
                by_segment += [(task, f"{column}={name}", _of_group(found, place)) for place, name in enumerate(names)]
    return [
        *_figures(overall, set(config.margins) | {"calibration"}, config.confidence),
        *_figures(by_segment, (set(config.segment_margins) | {"calibration"}) - {"grouped_auc"}, config.confidence),
    ]


def _judged_segments(rows: TaskRows, column: SegmentColumn, least_labels: int) -> tuple[list[str], Ints]:
    """Values that have enough labels of both kinds, and which of them each row has; -1 for none."""
    num_values = len(column.values)
    positives = np.bincount(column.codes, rows.labels, num_values)
    negatives = np.bincount(column.codes, minlength=num_values) - positives
    judged = np.flatnonzero(np.minimum(positives, negatives) >= least_labels)
    place = np.full(num_values, -1)
    place[judged] = np.arange(len(judged))
    return [column.values[int(value)] for value in judged], place[column.codes]


def _of_group(found: Mapping[str, Resampled], place: int) -> dict[str, Resampled]:
    part = slice(place, place + 1)
    return {metric: Resampled(one.values[:, part], one.draws[:, :, part]) for metric, one in found.items()}


def _figures(found: Sequence[tuple[str, str, Mapping[str, Resampled]]], metrics: set[str], confidence: float) -> Iterator[Figure]:
    """With intervals that all together have the confidence (Bonferroni)."""
    chosen = [(task, segment, metric, one[metric]) for task, segment, one in found for metric in one if metric in metrics]
    chosen = [entry for entry in chosen if np.isfinite(entry[3].values[0]).all()]
    bound = NormalDist().inv_cdf(1 - (1 - confidence) / (2 * max(len(chosen), 1)))
    for task, segment, metric, resampled in chosen:
        values, draws = resampled.values[:, 0], resampled.draws[:, :, 0]
        value, half = float(values[0]), bound * float(spread(draws[:, 0]))
        low, high = value - half, value + half
        if metric == "calibration":  # a ratio: its logarithm is about normal
            half = bound * float(spread(_log(draws[:, 0])))
            low, high = value * math.exp(-half), value * math.exp(half)
        figure = Figure(task=task, metric=metric, segment=segment, value=value, low=low, high=high)
        if len(values) > 1 and np.isfinite(values[1]):
            gains = _gain(metric, draws)
            gain, half = float(_gain(metric, values[None])[0]), bound * float(spread(gains))
            against = {"champion": float(values[1]), "gain": gain, "gain_low": gain - half, "gain_high": gain + half}
            figure = Figure(**asdict(figure) | against)
        yield figure


def _log(values: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs: Floats = np.log(values)
    return logs


def _gain(metric: str, values: Floats) -> Floats:
    """``(draws,)`` from ``(draws, models)``; more is better."""
    if metric == "calibration":
        distances = np.abs(_log(values))
        return distances[:, 1] - distances[:, 0]
    return values[:, 1] - values[:, 0] if metric == "normalized_entropy" else values[:, 0] - values[:, 1]


def judge_limits(metrics: Mapping[str, float], tasks: Iterable[str], config: GatesConfig) -> Iterator[Judgement]:
    """Absolute bounds, on metrics as ``metrics.json`` has them."""
    names = list(tasks)
    for key, bounds in config.limits.items():
        for name in [key] if "/" in key else [f"{task}/{key}" for task in names]:
            value = metrics.get(name, math.nan)
            yield Judgement(
                gate="limits", subject=name, is_passed=_is_within(value, bounds), detail=f"{value:.5g}, has to be {_words(bounds)}"
            )


def _is_within(value: float, bounds: BoundsConfig) -> bool:
    low, high = bounds.at_least, bounds.at_most
    return (low is None or value >= low) and (high is None or value <= high)  # nan is not within


def _words(bounds: BoundsConfig) -> str:
    parts = {"at least": bounds.at_least, "at most": bounds.at_most}
    return " and ".join(f"{words} {bound:g}" for words, bound in parts.items() if bound is not None)


def judge_calibration(figures: Iterable[Figure], config: GatesConfig) -> Iterator[Judgement]:
    """Predictions are as large as the labels, over all rows and in each segment."""
    for figure in figures:
        if figure.metric != "calibration":
            continue
        far = config.segment_calibration if figure.segment else config.calibration
        is_off = figure.low > 1 + far or figure.high < 1 - far
        is_better = figure.gain is not None and figure.gain > 0
        detail = f"{figure.value:.3f}, interval {figure.low:.3f} to {figure.high:.3f}; may be {far:.0%} from 1"
        if is_off and is_better:
            detail += f", and the champion's is further, {figure.champion:.3f}"
        yield Judgement(gate="calibration", subject=figure.subject, is_passed=not is_off or is_better, detail=detail)


def judge_regression(figures: Iterable[Figure], lost_tasks: Iterable[str], config: GatesConfig) -> Iterator[Judgement]:
    """Nothing that the champion does is done worse, over all rows or in a segment."""
    for task in lost_tasks:
        yield Judgement(gate="regression", subject=task, is_passed=False, detail="a task of the champion that the challenger has not")
    has_any = False
    for figure in figures:
        margin = _margin(figure, config)
        if margin is not None and figure.gain_high is not None and math.isfinite(figure.gain_high):
            has_any = True
            yield Judgement(
                gate="regression", subject=figure.subject, is_passed=not figure.gain_high < -margin, detail=_compared(figure, margin)
            )
    if not has_any:
        yield Judgement(
            gate="regression",
            subject="all metrics",
            is_passed=False,
            detail="none could be compared: no task of both with positives and negatives",
        )


def judge_gain(figures: Sequence[Figure], config: GatesConfig) -> Iterator[Judgement]:
    """Something over all rows is better than the champion's, by more than the margin and noise. Calibration alone is no reason."""
    compared = [figure for figure in figures if not figure.segment and figure.metric != "calibration" and figure.gain_low is not None]
    if not config.needs_gain:
        return
    better = [figure for figure in compared if _is_better(figure, config)]
    detail = "; ".join(_compared(figure, _margin(figure, config) or 0.0) for figure in better)
    if not better:
        names = ", ".join(figure.subject for figure in compared)
        detail = f"{NO_DIFFERENCE}: none of {names} is better than the champion's by more than its margin"
    subject = ", ".join(figure.subject for figure in better) or "all metrics"
    yield Judgement(gate="gain", subject=subject, is_passed=bool(better), detail=detail)


def _is_better(figure: Figure, config: GatesConfig) -> bool:
    margin = _margin(figure, config)
    return margin is not None and figure.gain_low is not None and figure.gain_low > margin


def _margin(figure: Figure, config: GatesConfig) -> float | None:
    return (config.segment_margins if figure.segment else config.margins).get(figure.metric)


def _compared(figure: Figure, margin: float) -> str:
    assert figure.champion is not None
    assert figure.gain is not None
    what = "gain in distance from 1" if figure.metric == "calibration" else "gain"
    return (
        f"{figure.value:.5f} instead of {figure.champion:.5f}: {what} {figure.gain:+.5f}, "
        f"interval {figure.gain_low:+.5f} to {figure.gain_high:+.5f}, margin {margin:g}"
    )


def judge_data(verdict: Verdict) -> Iterator[Judgement]:
    """The rows are like those that the challenger learned from."""
    failures = [finding for finding in verdict.findings if finding.severity == "fail"]
    for finding in failures:
        yield Judgement(gate="data", subject=f"{finding.check} of {finding.subject}", is_passed=False, detail=finding.detail)
    if not failures:
        warnings = len(verdict.raised)
        detail = f"{len(verdict.findings)} figures, {warnings} warnings"
        yield Judgement(gate="data", subject="rows against the training's", is_passed=True, detail=detail)


def judge_cost(challenger: Cost, champion: Cost | None, config: GatesConfig) -> Iterator[Judgement]:
    """Time and size, each against the champion and against a limit."""
    other_time, other_size = (None, None) if champion is None else (champion.milliseconds, champion.bytes)
    yield from _judge_cost(
        f"milliseconds for 1,000 rows, {challenger.form}",
        challenger.milliseconds,
        other_time,
        config.latency_ratio,
        config.latency_milliseconds,
    )
    yield from _judge_cost(f"bytes, {challenger.form}", challenger.bytes, other_size, config.size_ratio, config.size_bytes)


def _judge_cost(subject: str, value: float, champion: float | None, ratio: float | None, limit: float | None) -> Iterator[Judgement]:
    parts, is_passed = [f"{value:,.4g}"], True
    if champion is not None and ratio is not None:
        parts.append(f"{value / champion:.2f} times the champion's, may be {ratio:g}")
        is_passed = value <= ratio * champion
    if limit is not None:
        parts.append(f"may be {limit:,.4g}")
        is_passed = is_passed and value <= limit
    yield Judgement(gate="cost", subject=subject, is_passed=is_passed, detail="; ".join(parts))


def judge_missing(losses: Iterable[Loss], config: GatesConfig) -> Iterator[Judgement]:
    """No features that the model cannot do without, and without none of them is it behind the champion."""
    for loss in losses:
        detail = f"AUC {loss.whole:.4f} falls by {loss.loss:.4f} when {config.missing_share:.0%} of the rows lack it"
        detail += f", may fall by {config.missing_loss:g}"
        is_passed = not loss.loss > config.missing_loss
        if loss.champion is not None:
            detail += f"; the champion's is {loss.champion:.4f} then, it may be {config.missing_behind_champion:g} behind"
            is_passed = is_passed and not loss.champion - loss.without > config.missing_behind_champion
        yield Judgement(gate="missing features", subject=f"{loss.features}, {loss.task}", is_passed=is_passed, detail=detail)
