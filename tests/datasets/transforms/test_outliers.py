from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mlenv.datasets.transforms.outliers import ExcludeOutliersConfig
from mlenv.errors import ConfigError


def rows(*days, segment="a"):
    """One row group: for each (day, rows, positives) its rows, positives first."""
    columns = {"advertiser": [], "date": [], "label": []}
    for day, size, positives in days:
        columns["advertiser"] += [segment] * size
        columns["date"] += [f"2026-01-{day:02}"] * size
        columns["label"] += [1] * positives + [0] * (size - positives)
    return pa.RecordBatch.from_pydict(columns)


def config(**changes):
    return ExcludeOutliersConfig(**({"column": "advertiser", "label": "label"} | changes))


def dropped(config, *groups):
    findings = config.conclude([config.survey(group) for group in groups])
    return [part.tolist() for part in findings.dropped], findings.notes


def test_a_day_that_breaks_the_history_goes_and_is_named():
    # The history is 0.10, 0.12, 0.10: median 0.10, absolute deviation 0, chance sqrt(0.1 * 0.9 / 200) = 0.0212.
    steady = rows((1, 200, 20), (2, 200, 24), (3, 200, 20))
    assert dropped(config(), steady, rows((4, 200, 45))) == ([[], []], ())
    whole, notes = dropped(config(), steady, rows((4, 200, 46), (5, 200, 20)))
    assert whole == [[], list(range(200))]
    assert notes == ("advertiser=a on 2026-01-04: rate 0.23 after a median of 0.1, 200 rows",)


def test_a_segment_is_held_against_its_own_history_however_its_rows_are_cut():
    busy = rows((1, 200, 100), (2, 200, 110), (3, 200, 100), (4, 200, 105), segment="b")
    quiet = rows((1, 200, 4), (2, 200, 5), (3, 200, 4), (4, 200, 60))
    both = pa.Table.from_batches([busy, quiet]).combine_chunks().to_batches()[0]
    order = np.random.default_rng(0).permutation(both.num_rows)
    mixed = both.take(pa.array(order))
    found, _ = dropped(config(), mixed.slice(0, 700), mixed.slice(700))
    is_wrong = (np.array(mixed.column("advertiser")) == "a") & (np.array(mixed.column("date")) == "2026-01-04")
    assert found == [np.flatnonzero(is_wrong[:700]).tolist(), np.flatnonzero(is_wrong[700:]).tolist()]


def test_volume_counts_positives():
    days = [(1, 1000, 50), (2, 2000, 55), (3, 1000, 45), (4, 5000, 250)]
    assert dropped(config(), rows(*days))[0] == [[]]
    assert len(dropped(config(measure="volume"), rows(*days))[0][0]) == 5000


def test_excluded_days_are_no_history_and_small_days_are_not_judged():
    days = [(1, 200, 2), (2, 200, 2), (3, 200, 2), (4, 200, 90), (5, 200, 90), (6, 50, 50), (7, 200, 2)]
    assert dropped(config(), rows(*days))[0] == [list(range(600, 1000))]
    assert dropped(config(min_days=5), rows(*days))[0] == [[]]


def test_rows_without_a_segment_stay():
    none = pa.RecordBatch.from_pydict({"advertiser": pa.array([None] * 300), "date": ["2026-01-09"] * 300, "label": [1] * 300})
    assert dropped(config(), none.set_column(0, "advertiser", none.column(0).cast(pa.string())))[0] == [[]]
    assert dropped(config(), none.slice(0, 0).set_column(0, "advertiser", pa.array([], pa.string())))[0] == [[]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": "advertisers"}, "column: expected columns of the data.*did you mean 'advertiser'"),
        ({"label": "date"}, "label: expected a column of 0 and 1"),
        ({"day_column": "day"}, "day_column: expected columns of the data"),
        ({"deviations": 0.0}, "deviations: expected a number > 0"),
        ({"min_rows": 0}, "min_rows: expected a number >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes).output_schema(rows((1, 1, 1)).schema)
