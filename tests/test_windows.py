"""Windows and transforms in a config: lengths become days, and what contradicts itself is refused."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlenv.composition import compose, to_yaml
from mlenv.config import DaysConfig, WindowConfig
from mlenv.errors import ConfigError, Problems

SCHEMA = """
schema:
  features: {x: {kind: numeric}}
  labels: {click: {}}
  row_key: [key]
model: {kind: ranker}
name: a
output: out
"""


@pytest.fixture
def composed(tmp_path):
    def build(data, *more, schema=SCHEMA):
        file = tmp_path / "config.yaml"
        file.write_text(schema + f"data: {data}\n")
        return compose(file, more)

    return build


def test_lengths_become_windows(composed):
    days = "{end_date: 2026-03-02, num_train_days: 5, num_test_days: 2, skip_dates: [2026-02-27, 2026-01-01]}"
    config = composed(f"{{path: p, label_wait_days: 2, days: {days}}}", "data.days.num_validation_days=1", "loop.evaluate_every_steps=5")
    assert config.data.test == WindowConfig(start="2026-03-01", end="2026-03-02")
    assert config.data.validation == WindowConfig(start="2026-02-26", end="2026-02-26")
    assert config.data.train == WindowConfig(start="2026-02-21", end="2026-02-25")
    assert " days:" not in to_yaml(config)
    longer = composed(f"{{path: p, days: {days}}}")
    assert longer.data.train == WindowConfig(start="2026-02-23", end="2026-02-28", skip_dates=("2026-02-27",))
    assert longer.data.validation is None
    assert str(longer.data.train) == "2026-02-23 to 2026-02-28 without 2026-02-27"


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), st.integers(0, 4), st.sets(st.integers(0, 20), max_size=9))
def test_windows_have_their_lengths_and_do_not_touch(train, test, validation, wait, skipped):
    end = datetime.date(2026, 3, 20)
    skip = tuple((end - datetime.timedelta(days=distance)).isoformat() for distance in skipped)
    config = DaysConfig(end_date=end.isoformat(), num_train_days=train, num_test_days=test, num_validation_days=validation, skip_dates=skip)
    windows = config.windows(wait)
    lengths = {"train": train, "validation": validation, "test": test}
    days = {name: [day for day in map(str, range_of(window)) if window.holds(day)] for name, window in windows.items()}
    assert {name: len(found) for name, found in days.items()} == {name: length for name, length in lengths.items() if length}
    assert not {day for found in days.values() for day in found} & set(skip)
    last_known = windows.get("validation", windows["train"]).end
    gap = datetime.date.fromisoformat(windows["test"].start) - datetime.date.fromisoformat(last_known)
    assert gap.days > wait
    assert windows["train"].end <= last_known < windows["test"].start


def range_of(window):
    first, last = datetime.date.fromisoformat(window.start), datetime.date.fromisoformat(window.end)
    return [first + datetime.timedelta(days=distance) for distance in range((last - first).days + 1)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{path: p, days: {end_date: 2026-03-02, num_train_days: 5}}", r"data\.days\.num_test_days: expected a value"),
        ("{path: p, days: {end_date: soon, num_train_days: 5, num_test_days: 1}}", r"data\.days\.end_date: expected a day as YYYY-MM-DD"),
        (
            "{path: p, days: {end_date: 2026-03-02, num_train_days: 0, num_test_days: 1}}",
            r"data\.days\.num_train_days: expected a number >= 1",
        ),
        ("{path: p, days: {end_dat: 2026-03-02}}", r"data\.days\.end_dat: expected a key of DaysConfig.*did you mean 'end_date'"),
        (
            "{path: p, train: {}, days: {end_date: 2026-03-02, num_train_days: 1, num_test_days: 1}}",
            r"data\.train: expected nothing beside data\.days.*set data\.train to null",
        ),
        (
            "{path: p, days: {end_date: 2026-03-02, num_train_days: 999999999, num_test_days: 1}}",
            r"data\.days\.num_train_days: expected days that the calendar has",
        ),
        (
            "{path: p, label_wait_days: 9999999999, train: {end: 2026-01-02}, test: {start: 2026-01-04}}",
            r"data\.train: expected days before the test window",
        ),
        ("{path: p, train: {skip_dates: [x]}}", r"data\.train\.skip_dates: expected a day as YYYY-MM-DD"),
        (
            "{path: p, label_wait_days: 2, train: {end: 2026-01-02}, test: {start: 2026-01-04}}",
            r"data\.train: expected days before the test window \(2026-01-04 to latest\) by more than label_wait_days, 2",
        ),
        ("{path: p, train: {}, on_bad_file: skip}", r"data\.max_bad_row_groups: expected a number > 0 with on_bad_file: skip"),
        ("{path: p, train: {}, max_bad_row_groups: 3}", r"data\.max_bad_row_groups: expected a number > 0 with on_bad_file: skip, and 0"),
        ("{path: p, train: {}, label_wait_days: -1}", r"data\.label_wait_days: expected a number >= 0"),
        ("{path: p, train: {}, transforms: [{kind: filtr, where: x > 1}]}", r"data\.transforms\[0\]\.kind: expected one of .*'filter'"),
        ("{path: p, train: {}, transforms: [{kind: filter, where: x >}]}", r"data\.transforms\[0\]\.where: expected an SQL expression"),
        (
            "{path: p, train: {}, transforms: [{kind: sample, default_rate: 0.5}, {kind: filter, where: x > 1}, {kind: sample}]}",
            r"data\.transforms\[2\]\.seed: expected another seed than data\.transforms\[0\]",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(composed, data, message):
    with pytest.raises((Problems, ConfigError), match=message):
        composed(data)


def test_a_waiting_time_that_is_kept_is_fine(composed):
    composed("{path: p, label_wait_days: 2, train: {end: 2026-01-01}, test: {start: 2026-01-04}}")
    composed("{path: p, label_wait_days: 2, train: {path: a, end: 2026-01-02}, test: {path: b, start: 2026-01-04}}")


def test_windows_given_after_all_take_the_place_of_lengths(composed):
    days = "{end_date: 2026-03-02, num_train_days: 5, num_test_days: 2}"
    assert composed(f"{{path: p, days: {days}}}", "data.days=null", "data.train.end=2026-01-01").data.train.end == "2026-01-01"


NEGATIVES = "{path: p, train: {}, transforms: [{kind: sample_negatives, negative: click = 0, rate: 0.1, weight_column: w}]}"


def test_a_class_of_another_kind_is_no_transform(composed):
    with pytest.raises(Problems, match=r"data\.transforms\[0\]\.kind: expected a class with the members of mlenv\.config\.TransformConfig"):
        composed("{path: p, train: {}, transforms: [{kind: 'mlenv.config:LoopConfig'}]}")


def test_a_sampler_needs_a_row_key(composed):
    with pytest.raises(Problems, match=r"schema\.row_key: expected columns, because data\.transforms\[0\] samples by it"):
        composed(NEGATIVES, schema=SCHEMA.replace("[key]", "[]"))


def test_sampling_is_corrected_once(composed):
    rate = "calibration.click={kind: negative_sampling, rate: 0.1}"
    with pytest.raises(Problems, match=r"calibration\.click\.kind: expected another kind, because the weights of data\.transforms\[0\]"):
        composed(NEGATIVES, "schema.labels.click.weight=w", rate)
    composed(NEGATIVES, rate)
    config = composed(NEGATIVES, "schema.labels.click.weight=w")
    assert "kind: sample_negatives" in to_yaml(config)
