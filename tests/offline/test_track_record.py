from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from mlenv.errors import DataError
from mlenv.offline.track_record import LEAST, read_table, records


def experiments(num: int, seed: int = 0) -> pl.DataFrame:
    """Online changes of 0.5 of what one metric says; another metric says nothing."""
    random = np.random.default_rng(seed)
    told = random.normal(0, 1, num)
    error = random.uniform(0.05, 0.2, num)
    return pl.DataFrame(
        {
            "experiment": [f"e{number}" for number in range(num)],
            "auc": told,
            "ne": random.normal(0, 1, num),
            "online": 0.5 * told + random.normal(0, error),
            "online_error": error,
        }
    )


def test_a_metric_that_tells_and_one_that_does_not():
    first, second = records(experiments(60))
    assert (first.metric, second.metric) == ("auc", "ne")
    assert first.sentence == "has foretold the online change"
    assert second.sentence == "no relation is shown"
    assert first.agreement > 0.85  # where signs are sure
    assert abs(first.slope - 0.5) < 4 * first.slope_error
    assert first.low < first.rank_correlation < first.high + 0.05


def test_figures_by_hand():
    frame = pl.DataFrame({"auc": [1.0, 2.0, -1.0], "online": [2.0, 1.0, 1.0], "online_error": [1.0, 1.0, 2.0]})
    (record,) = records(frame)
    assert record.slope == pytest.approx((2 + 2 - 1 / 4) / (1 + 4 + 1 / 4))
    assert record.slope_error == pytest.approx((1 + 4 + 1 / 4) ** -0.5)
    assert record.rank_correlation == pytest.approx(np.corrcoef([2, 3, 1], [3, 1.5, 1.5])[0, 1])
    certain = np.array([0.9544997, 0.6826895, 0.3829249])
    assert record.agreement == pytest.approx(certain[:2].sum() / certain.sum())
    assert f"at least {LEAST}" in record.sentence


def test_wrong_tables_are_refused(tmp_path):
    file = tmp_path / "tests.csv"
    with pytest.raises(DataError, match=r"tests\.csv"):
        read_table(file)
    experiments(3).drop("online_error").write_csv(file)
    with pytest.raises(DataError, match="online_error"):
        read_table(file)
    experiments(3).with_columns(online_error=pl.lit(0.0)).write_csv(file)
    with pytest.raises(DataError, match="above 0"):
        read_table(file)
    experiments(3).write_csv(file)
    with pytest.raises(DataError, match="metric 'gauc'"):
        records(read_table(file), ["gauc"])
    with pytest.raises(DataError, match="each offline metric"):
        records(experiments(3).select("experiment", "online", "online_error"))
