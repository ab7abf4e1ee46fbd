"""What has become of the features that registered models use: their coverage now against that of the model's training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlenv.catalogue.feature_catalogue import Catalogue, Run
from mlenv.catalogue.feature_record import FeatureRecord, record_features
from mlenv.checks.findings import SEVERITIES, Chance, Finding, judge
from mlenv.checks.validation import Covered, coverage_drop, window_by_day
from mlenv.config import ExperimentConfig
from mlenv.models.registry import ModelVersion

if TYPE_CHECKING:
    from mlenv.checks.validation_run import Window


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A feature that a registered model has less of than it was trained with."""

    version: ModelVersion
    feature: str
    owner: str
    day: str
    where: str
    """The run, or the window of a config, whose data that day is of."""
    before: float
    """Coverage in the model's own training record."""
    now: float
    finding: Finding


@dataclass(frozen=True, kw_only=True)
class Alerts:
    """What was found, and what could not be compared."""

    raised: Sequence[Alert]
    """Failures first, then by how much is gone."""
    num_compared: int
    """Features of models."""
    notes: Sequence[str]
    """What could not be compared, and why."""

    @property
    def has_failure(self) -> bool:
        return any(alert.finding.severity == "fail" for alert in self.raised)


@dataclass(frozen=True)
class Measured:
    """What a later run, or a look at the data, says."""

    where: str
    record: FeatureRecord


def find_alerts(catalogue: Catalogue, *, every_version: bool = False, measured: Measured | None = None) -> Alerts:
    """Judges the newest day that a later run recorded, or that was measured, by the limits of the model's own config.

    Args:
        every_version: also versions without an alias.
        measured: instead of what later runs recorded.
    """
    runs = {run.run_id: run for run in catalogue.runs}
    raised: list[Alert] = []
    notes, num_compared = [], 0
    for version in catalogue.versions:
        if not (version.aliases or every_version):
            continue
        run = runs.get(version.run_id)
        if run is None or run.record is None:
            reason = "its run is not here" if run is None else f"run {run} has no record of its features; train it again"
            notes.append(f"{version}: {reason}")
            continue
        later = [*_later(catalogue.runs, run)] if measured is None else [measured]
        if not later:
            notes.append(f"{version}: no later run has recorded its features")
            continue
        alerts = [alert for name in run.schema.features if (alert := _compared(version, run, name, later)) is not None]
        num_compared += len(alerts)
        raised += [alert for alert in alerts if alert.finding.severity != "pass"]
    raised.sort(key=lambda alert: (SEVERITIES.index(alert.finding.severity), alert.now - alert.before, alert.feature, str(alert.version)))
    if not notes and not num_compared:
        notes.append("no registered model version" + ("" if every_version else " has an alias; --all takes those without one, too"))
    return Alerts(raised=raised, num_compared=num_compared, notes=notes)


def measure(config: ExperimentConfig, window: Window | None = None) -> Measured:
    """Reads a window of a config: the test window if there is one, else the training window.

    Raises:
        ConfigError, DataError: it cannot be read.
    """
    from mlenv.checks.validation_run import window_source  # loads torch, which nothing else here needs

    chosen: Window = window or ("train" if config.data.test is None else "test")
    statistics, days = window_by_day(window_source(config, chosen))
    return Measured(f"data.{chosen} of {config.name}", record_features(statistics, days, config.checks.significance))


def _later(runs: Iterable[Run], run: Run) -> Iterator[Measured]:
    for one in runs:
        if one.record is not None and one.started_ms > run.started_ms:
            yield Measured(f"run {one}", one.record)


def _compared(version: ModelVersion, run: Run, name: str, later: Sequence[Measured]) -> Alert | None:
    """None where nobody has recorded the feature since; ``later`` is newest first: of two that recorded the same day the first counts."""
    found = [(day, place) for place, one in enumerate(later) for day in one.record.features.get(name, ())]
    if run.record is None or not run.record.features.get(name) or not found:
        return None
    newest = max(day for day, _ in found)
    measured = later[next(place for day, place in found if day == newest)]
    entry = measured.record.features[name][newest]
    now, before = Covered(entry.coverage, entry.rows), run.record.covered(name)
    chance = Chance(run.checks.significance, max(measured.record.rows_per_request, run.record.rows_per_request))
    (finding,) = judge([coverage_drop(name, name, now, before, chance)], run.schema, run.checks).findings
    return Alert(
        version=version,
        feature=name,
        owner=run.schema.features[name].owner,
        day=newest,
        where=measured.where,
        before=before.share,
        now=now.share,
        finding=finding,
    )
