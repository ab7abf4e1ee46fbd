"""Alerts about the features of registered models, against judgements by hand."""

from __future__ import annotations

import pytest

from mlenv.catalogue.feature_alerts import Measured, find_alerts
from mlenv.catalogue.feature_catalogue import Catalogue, Run
from mlenv.catalogue.feature_record import FeatureDay, FeatureRecord
from mlenv.catalogue.feature_text import alerts_text
from mlenv.config import ChecksConfig, Limits
from mlenv.models.registry import ModelVersion
from mlenv.schema import Label, Numeric, Schema

SCHEMA = Schema(features={"price": Numeric(owner="pricing"), "age": Numeric(core=True)}, labels={"click": Label()})


def record(rows_per_request: float = 1.0, rows: int = 10_000, **coverages: dict[str, float]) -> FeatureRecord:
    def day(coverage: float) -> FeatureDay:
        return FeatureDay(rows=rows, coverage=coverage, mean=0.0, distinct=None, drift=None, drift_by_chance=None, label_rates={})

    features = {name: {date: day(coverage) for date, coverage in days.items()} for name, days in coverages.items()}
    return FeatureRecord(rows_per_request=rows_per_request, features=features)


def run(number: int, found: FeatureRecord | None, checks: ChecksConfig = ChecksConfig()) -> Run:  # noqa: B008
    return Run(
        run_id=f"{number:032x}", name=f"r{number}", started_ms=number, data_sets=("logs",), schema=SCHEMA, checks=checks, record=found
    )


def catalogue(*runs: Run, aliases: tuple[str, ...] = ("champion",)) -> Catalogue:
    """The model is made from the first run."""
    version = ModelVersion(name="ranker", version="1", aliases=aliases, run_id=runs[0].run_id)
    return Catalogue(store="here", runs=sorted(runs, key=lambda one: -one.started_ms), versions=[version])


TRAINED = record(price={"d1": 0.9, "d2": 0.8}, age={"d1": 1.0, "d2": 1.0})


@pytest.mark.parametrize(
    ("name", "now", "severity"),
    [
        ("price", 0.84, None),  # 0.01 less than the 0.85 of the training is not beyond the limit of a warning
        ("price", 0.80, "warn"),
        ("price", 0.70, "fail"),
        ("price", 0.95, None),
        ("age", 0.95, "fail"),  # of a core feature a warning is a failure
    ],
)
def test_the_newest_day_is_judged_by_the_limits_of_the_checks(name: str, now: float, severity: str | None) -> None:
    whole = {"price": {"d3": 0.1, "d4": 0.85}, "age": {"d3": 0.1, "d4": 1.0}}  # the older day does not count
    later = record(**whole | {name: {"d3": 0.1, "d4": now}})
    limits = ChecksConfig(coverage_drop=Limits(warn=0.02, fail=0.1))
    found = find_alerts(catalogue(run(1, TRAINED, limits), run(2, later)))
    assert found.num_compared == 2
    assert [(alert.feature, alert.day, alert.finding.severity) for alert in found.raised] == ([(name, "d4", severity)] if severity else [])
    assert found.has_failure == (severity == "fail")


def test_a_drop_that_chance_brings_about_is_no_alert() -> None:
    # 85 % against 80 %: of 10,000 independent rows that is far beyond chance, of rows in requests of 500 it is not.
    for rows_per_request, number in ((1.0, 1), (500.0, 0)):
        found = find_alerts(catalogue(run(1, TRAINED), run(2, record(rows_per_request, price={"d3": 0.8}, age={"d3": 1.0}))))
        assert len(found.raised) == number


def test_of_two_runs_with_the_same_day_the_newer_counts_and_earlier_runs_do_not() -> None:
    early = run(0, record(price={"d9": 0.0}))
    found = find_alerts(catalogue(run(1, TRAINED), early, run(2, record(price={"d3": 0.0})), run(3, record(price={"d3": 0.5}))))
    (alert,) = found.raised
    assert (alert.feature, alert.owner, alert.day, alert.where) == ("price", "pricing", "d3", "run r3 (00000000)")
    assert (alert.before, alert.now) == (pytest.approx(0.85), 0.5)
    assert found.num_compared == 1  # nobody has recorded the age since
    text = alerts_text(found)
    assert "FAIL  ranker version 1 (@champion)  price    pricing  d3, run r3 (00000000)  85.00%  50.00%" in text
    assert text.endswith("1 failures, 0 warnings among 1 features of registered models")


def test_versions_without_an_alias_and_data_measured_now() -> None:
    plain = catalogue(run(1, TRAINED), aliases=())
    assert "no registered model version has an alias" in find_alerts(plain).notes[0]
    assert find_alerts(plain, every_version=True).notes == ["ranker version 1: no later run has recorded its features"]
    measured = Measured("data.test of demo", record(price={"d3": 0.2}))
    (alert,) = find_alerts(plain, every_version=True, measured=measured).raised
    assert (alert.where, alert.now) == ("data.test of demo", 0.2)


def test_what_cannot_be_compared_is_said() -> None:
    old = catalogue(run(1, None), run(2, TRAINED))
    assert find_alerts(old).notes == ["ranker version 1 (@champion): run r1 (00000000) has no record of its features; train it again"]
    nothing_read = catalogue(run(1, record(price={}, age={})), run(2, TRAINED))
    assert (find_alerts(nothing_read).num_compared, find_alerts(nothing_read).raised) == (0, [])
    gone = Catalogue(store="here", runs=[], versions=old.versions)
    assert find_alerts(gone).notes == ["ranker version 1 (@champion): its run is not here"]
