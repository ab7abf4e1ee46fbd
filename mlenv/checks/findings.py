"""What was found in data and what it means: figures held to their limits, beyond what chance brings about."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlenv.config import ChecksConfig, Limits
from mlenv.errors import GateError
from mlenv.schema import Schema

Severity = Literal["fail", "warn", "pass"]
SEVERITIES: tuple[Severity, ...] = ("fail", "warn", "pass")

DRIFT = ("psi", "jensen_shannon", "kolmogorov_smirnov", "out_of_range")
"""Checks that ``ChecksConfig.may_drift`` takes a feature out of."""

FIXES = {
    "coverage_drop": "find what stopped writing the column; until then train without the feature, or with feature dropout",
    **dict.fromkeys(
        ("psi", "jensen_shannon", "kolmogorov_smirnov"),
        "look for a changed source; train anew if the world has changed; name a feature of the calendar in checks.may_drift",
    ),
    "out_of_range": "look for a changed unit or a broken source; clip the column if the values are right",
    "new_value": "map the value to the one it replaces, or add it to the vocabulary and train again",
    "unseen_ids": "look for ids that are written in another way than before",
    "lost_value": "look for a renamed value or a filter that drops its rows",
    "label_rate": "wait until the labels are complete, or repair their join",
    "label_rate_by_segment": "look at what changed for this segment alone",
    "missing_days": "write the missing day, or end the window before it",
    "late_hours": "wait until the day is complete, or end the window before it",
    "repeated_keys": "remove the repeated rows, or correct schema.row_key",
    "repeated_rows": "remove the repeated rows",
    "backfill_label_auc": "look for rows of the back-fill that hold what happened after the event, such as the rest of its day",
    "backfill_disagreement": "make the back-fill compute what the service logged: the same source, time and rounding",
    **dict.fromkeys(
        ("score_psi", "score_distance"),
        "look which feature moved (mlenv skew, mlenv replay); train anew if the world has changed; roll back if the model is new",
    ),
    "score_calibration": "fit the calibrators anew (mlenv evaluate), or train anew; see that the labels are complete",
    "data_age_hours": "find what stopped writing the log",
    "model_age_days": "train on newer days: mlenv train, mlenv register, mlenv promote",
    "leakage_auc": "take the feature out if it is known only after the label",
}
"""What to do about a finding, by check."""


@dataclass(frozen=True)
class Finding:
    """One figure and what it means."""

    severity: Severity
    check: str
    """A field of ChecksConfig."""
    subject: str
    """Feature, task, segment, day or ``rows``."""
    value: float
    limit: float | None
    """The one that was exceeded; the first one that could be, for a pass."""
    detail: str
    """What was found, in words."""

    @property
    def fix(self) -> str:
        """What to do about it."""
        return FIXES[self.check]


@dataclass(frozen=True)
class Verdict:
    """All findings, the worst first."""

    findings: Sequence[Finding]

    @property
    def severity(self) -> Severity:
        """That of the worst finding."""
        return self.findings[0].severity if self.findings else "pass"

    @property
    def raised(self) -> list[Finding]:
        """Findings that are no pass."""
        return [finding for finding in self.findings if finding.severity != "pass"]

    def to_plain(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"severity": self.severity, "findings": [asdict(finding) | {"fix": finding.fix} for finding in self.findings]}

    def require(self, what: str) -> None:
        """Raises GateError if there is a failure."""
        failures = [finding for finding in self.findings if finding.severity == "fail"]
        if failures:
            lines = [f"  - {finding.check} of {finding.subject}: {finding.detail} Fix: {finding.fix}." for finding in failures]
            raise GateError("\n".join([f"{what} failed {len(failures)} of its checks.", *lines]))


@dataclass(frozen=True)
class Chance:
    """What differences bring about by themselves between two samples of these sizes."""

    significance: float
    """Standard errors."""
    rows_per_request: float
    """Rows of a request resemble each other: so many count as one."""

    def _error(self, size: float, other: float) -> float:
        return math.sqrt(self.rows_per_request * (1 / size + 1 / other))

    def is_less_than(self, share: float, size: float, other_share: float, other_size: float) -> bool:
        """Whether two shares differ by more than chance."""
        pooled = (share * size + other_share * other_size) / (size + other_size)
        spread = math.sqrt(max(pooled * (1 - pooled), 0.0))
        return abs(share - other_share) > self.significance * spread * self._error(size, other_size)

    def distance(self, size: float, other: float) -> float:
        """Between two cumulative distributions: as improbable as so many standard errors are (Dvoretzky-Kiefer-Wolfowitz)."""
        return self.significance / 2 * self._error(size, other)

    def stability(self, num_parts: int, size: float, other: float) -> float:
        """Of the population stability index: about ``1/n + 1/m`` times a chi-squared variable of ``num_parts - 1`` degrees.

        Source of the bound on its tail: Laurent and Massart, "Adaptive Estimation of a Quadratic Functional by Model
        Selection", The Annals of Statistics, 2000.
        """
        freedom = max(num_parts - 1, 1)
        return self._error(size, other) ** 2 * (freedom + self.significance * math.sqrt(2 * freedom) + self.significance**2)


@dataclass(frozen=True)
class Measure:
    """A figure before it is held to its limits."""

    check: str
    """A field of ChecksConfig."""
    subject: str
    value: float
    detail: str
    is_beyond_chance: bool = True
    feature: str = ""
    """The feature that it belongs to; empty for rows, days and tasks."""


def judge(measures: Iterable[Measure], schema: Schema, checks: ChecksConfig) -> Verdict:
    """Holds the measures to their limits."""
    judged = [one for one in measures if one.check not in DRIFT or one.feature not in checks.may_drift]
    findings = [_judged(measure, schema, checks) for measure in judged]
    return Verdict(sorted(findings, key=lambda found: (SEVERITIES.index(found.severity), -_excess(found), found.check, found.subject)))


def _judged(measure: Measure, schema: Schema, checks: ChecksConfig) -> Finding:
    limits: Limits = getattr(checks, measure.check)
    severity: Severity = "pass"
    limit = limits.warn if limits.warn is not None else limits.fail
    if measure.is_beyond_chance:
        if limits.fail is not None and measure.value >= limits.fail:
            severity, limit = "fail", limits.fail
        elif limits.warn is not None and measure.value >= limits.warn:
            is_core = measure.feature in schema.features and schema.features[measure.feature].core
            severity = "fail" if is_core else "warn"
    return Finding(severity, measure.check, measure.subject, float(measure.value), limit, measure.detail)


def _excess(finding: Finding) -> float:
    return finding.value / finding.limit if finding.limit else finding.value
