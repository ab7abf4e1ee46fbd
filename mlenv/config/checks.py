"""What data are held to: ``checks`` of a config."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlenv.errors import ConfigError, check_at_least


@dataclass(frozen=True, kw_only=True)
class Limits:
    """From where on a figure is a warning, and from where on a failure; null for never."""

    warn: float | None
    fail: float | None

    def __post_init__(self) -> None:
        for name, value in (("warn", self.warn), ("fail", self.fail)):
            if value is not None:
                check_at_least(name, value, 0)
        if self.warn is not None and self.fail is not None and self.warn > self.fail:
            raise ConfigError("warn", expected=f"at most the limit of a failure, {self.fail}", received=self.warn)


@dataclass(frozen=True, kw_only=True)
class ChecksConfig:
    """What the data are held to, by ``mlenv validate`` and before a training; by ``mlenv monitor`` with what a model makes of them.

    For a core feature a warning is a failure.

    A difference counts only when it is larger than its limit and than what chance brings in so few rows.
    """

    before_training: bool = False
    """Judge the training window before the first step; a failure stops the training with exit code 3."""
    baseline: str = ""
    """What the training window is compared with then: statistics in a file, or in the output folder of an earlier training;
    empty for nothing, and then it is judged by itself."""
    may_drift: tuple[str, ...] = ()
    """Features whose distribution is free to change, such as the weekend: psi, jensen_shannon, kolmogorov_smirnov and
    out_of_range leave them out."""
    significance: float = 4.0
    """Standard errors that a difference must exceed; of rows that come in requests, a request counts as one row."""
    coverage_drop: Limits = Limits(warn=0.01, fail=0.1)
    """Share of the rows that a feature is missing from and was not missing from before."""
    psi: Limits = Limits(warn=0.1, fail=0.25)
    """Population stability index: of numbers over tenths of the baseline, of ids over those that are at least 2 % of it and the rest."""
    jensen_shannon: Limits = Limits(warn=0.02, fail=0.1)
    """Jensen-Shannon divergence in bits over the same parts: 0 for equal ones, 1 where nothing is shared."""
    kolmogorov_smirnov: Limits = Limits(warn=0.1, fail=0.25)
    """Largest distance between two cumulative distributions of a number."""
    out_of_range: Limits = Limits(warn=0.001, fail=0.05)
    """Share of the numbers that lie below the least or above the greatest of the baseline."""
    new_value: Limits = Limits(warn=0.02, fail=0.1)
    """Share of one value that the baseline does not have."""
    lost_value: Limits = Limits(warn=0.02, fail=0.1)
    """Share in the baseline of one value that is gone."""
    unseen_ids: Limits = Limits(warn=0.9, fail=0.97)
    """Share of all ids that the baseline does not have; many, where a day brings new users and items."""
    label_rate: Limits = Limits(warn=0.2, fail=0.35)
    """Relative change of the label rate of a task, over all and on each day."""
    label_rate_by_segment: Limits = Limits(warn=0.5, fail=None)
    """Relative change of the label rate of a task for a value of a segment column."""
    missing_days: Limits = Limits(warn=None, fail=1)
    """Days without rows inside the window."""
    late_hours: Limits = Limits(warn=1, fail=6)
    """Hours by which the newest event of a day lies further from the day's end than that of any day of the baseline."""
    repeated_keys: Limits = Limits(warn=0.0001, fail=0.01)
    """Share of the rows whose row key an earlier row has."""
    repeated_rows: Limits = Limits(warn=0.001, fail=0.01)
    """Share of the rows that repeat another one in all but the row key; judged where the rows have an event time."""
    leakage_auc: Limits = Limits(warn=0.9, fail=0.95)
    """AUC of one feature alone for a task."""
    score_psi: Limits = Limits(warn=0.1, fail=0.25)
    """``mlenv monitor``: population stability index of the predictions of a task, over tenths of the reference."""
    score_distance: Limits = Limits(warn=0.1, fail=0.25)
    """The same as the largest distance between the two cumulative distributions of the predictions (Kolmogorov and Smirnov)."""
    score_calibration: Limits = Limits(warn=0.1, fail=0.25)
    """``mlenv monitor``: how far the sum of the predictions over the sum of the labels is from 1, where rows have labels."""
    data_age_hours: Limits = Limits(warn=36, fail=72)
    """``mlenv monitor``: hours since the newest event; without an event time, since the end of the newest day in UTC."""
    model_age_days: Limits = Limits(warn=14, fail=30)
    """``mlenv monitor``: days since the end of the last day that the model was trained on."""
    backfill_label_auc: Limits = Limits(warn=0.02, fail=0.05)
    """With ``--backfilled``: AUC of one feature alone for a task on back-filled days minus the same on days that were logged."""
    backfills: dict[str, str] = field(default_factory=dict)
    """Back-filled columns and the columns beside them that hold the same as it was logged; compared row by row."""
    backfill_tolerance: float = 1e-6
    """Difference relative to the larger one up to which two numbers agree; integers, texts and truth values agree only when equal."""
    backfill_disagreement: Limits = Limits(warn=0.01, fail=0.1)
    """Share of the rows with both columns of a pair in which they differ, over all and on the worst day."""

    def __post_init__(self) -> None:
        check_at_least("significance", self.significance, 0)
        check_at_least("backfill_tolerance", self.backfill_tolerance, 0)
