"""What a model is held to before it is served: ``gates`` of a config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from mlenv.errors import ConfigError, Problems, check_above, check_at_least, nearest

COMPARED: Final = ("auc", "grouped_auc", "normalized_entropy", "calibration")
"""Metrics that a challenger and the champion are compared in."""


@dataclass(frozen=True, kw_only=True)
class BoundsConfig:
    """Where a metric may lie; null for no bound."""

    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise ConfigError("at_least", expected="a number, or one for at_most", received=None)
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ConfigError("at_least", expected=f"at most at_most, {self.at_most}", received=self.at_least)


def _limits() -> dict[str, BoundsConfig]:
    return {"normalized_entropy": BoundsConfig(at_most=1.0)}


def _margins() -> dict[str, float]:
    return {"auc": 0.002, "grouped_auc": 0.002, "normalized_entropy": 0.002, "calibration": 0.05}


def _segment_margins() -> dict[str, float]:
    return {"auc": 0.01, "normalized_entropy": 0.01, "calibration": 0.1}


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """What ``mlenv promote`` holds a challenger to. Every gate is passed, or it is not promoted.

    A difference to the champion counts when the whole interval of it, from requests drawn anew, lies beyond the margin.
    """

    limits: dict[str, BoundsConfig] = field(default_factory=_limits)
    """Bounds of a metric of ``metrics.json``, of all tasks (``auc``) or of one (``click/auc``)."""
    calibration: float = 0.1
    """How far the calibration of a task may be from 1, relatively and beyond noise; where the champion is further still, further is no
    failure."""
    segment_calibration: float = 0.2
    """The same for each value of a segment column."""
    margins: dict[str, float] = field(default_factory=_margins)
    """Differences to the champion that count as none, such as those that another seed makes: ``mlenv compare`` measures them. A metric
    that is not named is not compared. Of the calibration it is the distance from 1 that is compared."""
    segment_margins: dict[str, float] = field(default_factory=_segment_margins)
    """The same for each value of a segment column."""
    needs_gain: bool = True
    """One metric of one task has to be better than the champion's, and none worse. Without it, it is enough that none is worse."""
    confidence: float = 0.95
    """Of all intervals over all rows together, and of all those of segments together."""
    resamples: int = 400
    """How often requests are drawn anew; the spread of what comes out makes the intervals."""
    least_labels: int = 100
    """Positives, and negatives, that a segment needs to be judged."""
    common_rows: float = 0.99
    """Share of the rows of either model that the other has scored, too."""
    data_checks: bool = True
    """Hold the rows to the statistics of the challenger's training, by its own ``checks``: a failure is one here."""
    missing_share: float = 0.1
    """Share of the rows in which features are taken away, those of an entity together and each core feature, to see what a model loses."""
    missing_loss: float = 0.05
    """AUC that a model may lose by it."""
    missing_behind_champion: float = 0.01
    """AUC by which it may be behind the champion when both lack the same."""
    missing_rows: int = 100_000
    """Rows that this is measured on; 0 for none, and it is not judged."""
    export: Literal["onnx", "aoti", "program"] | None = None
    """Format of a package that both models are exported to, as ``mlenv export`` does: the challenger's predictions have to be the same
    there on all rows, and it is the packages whose time and size are judged. null judges the models as they were trained."""
    latency_ratio: float | None = 1.5
    """How much longer than the champion a model may take to score the same rows on the same machine; null for no limit."""
    latency_milliseconds: float | None = None
    """Longest time for 1,000 rows; null for no limit."""
    size_ratio: float | None = 2.0
    """How much larger than the champion a model may be; null for no limit."""
    size_bytes: int | None = None
    """Most bytes that its parameters, or its package's graph, may take; null for no limit."""

    def __post_init__(self) -> None:
        for name in ("calibration", "segment_calibration", "missing_loss", "missing_behind_champion", "missing_rows"):
            check_at_least(name, getattr(self, name), 0)
        for name in ("latency_ratio", "latency_milliseconds", "size_ratio", "size_bytes", "resamples", "least_labels"):
            if getattr(self, name) is not None:
                check_above(name, getattr(self, name), 0)
        for name in ("confidence", "common_rows", "missing_share"):
            if not 0 < getattr(self, name) <= 1 or (name == "confidence" and self.confidence == 1):
                raise ConfigError(name, expected="a share of 1", received=getattr(self, name))
        problems = []
        for name in ("margins", "segment_margins"):
            for metric, margin in getattr(self, name).items():
                if metric not in COMPARED:
                    problems.append(ConfigError(f"{name}.{metric}", expected="a metric", received=metric, fix=nearest(metric, COMPARED)))
                elif not margin >= 0:
                    problems.append(ConfigError(f"{name}.{metric}", expected="a number >= 0", received=margin))
        if problems:
            raise Problems("gates", problems)
