from __future__ import annotations

import math
from datetime import date

import pyarrow as pa
import pytest

from mlenv.datasets.best_reachable import best_reachable
from mlenv.datasets.day_partitions import write_day_partitions
from mlenv.errors import DataError

FIRST, SECOND, THIRD = (date(2026, 1, day) for day in (1, 2, 3))


def rows(clicks, conversions, click_probabilities, conversion_probabilities):
    columns = {
        "click": pa.array(clicks, pa.int8()),
        "conversion": pa.array(conversions, pa.int8()),
        "true_click_probability": pa.array(click_probabilities, pa.float32()),
        "true_conversion_probability": pa.array(conversion_probabilities, pa.float32()),
    }
    return pa.table(columns)


@pytest.fixture
def log(tmp_path):
    days = [
        (FIRST, rows([1, 0], [1, 0], [0.8, 0.6], [0.5, 0.9])),
        (SECOND, rows([1, 0], [0, 0], [0.6, 0.1], [0.25, 0.9])),
        (THIRD, rows([0, 0], [0, 0], [0.1, 0.1], [0.1, 0.1])),
    ]
    write_day_partitions(iter(days), tmp_path / "log")
    return tmp_path / "log"


def test_by_hand(log):
    truth = best_reachable(log, [FIRST, SECOND])
    assert truth["click"].positive_rate == 0.5
    assert truth["click"].auc == pytest.approx(3.5 / 4)  # of four pairs, one is a tie
    assert truth["click"].normalized_entropy == pytest.approx(-math.log(0.8 * 0.4 * 0.6 * 0.9) / 4 / math.log(2), rel=1e-6)
    assert truth["conversion"].auc == 1.0  # on the two clicked rows
    assert truth["conversion"].normalized_entropy == pytest.approx(-math.log(0.5 * 0.75) / 2 / math.log(2))


def test_all_days(log):
    assert best_reachable(log)["click"].positive_rate == pytest.approx(2 / 6)


def test_labels_of_one_class(log):
    truth = best_reachable(log, {THIRD})
    assert truth["click"].positive_rate == 0
    assert math.isnan(truth["click"].auc)
    assert math.isnan(truth["click"].normalized_entropy)
    assert math.isnan(truth["conversion"].positive_rate)


def test_names_a_day_that_is_not_there(log):
    with pytest.raises(DataError, match=r"expected a simulated log with 2026-01-09\. Received: '2026-01-01 to 2026-01-03'"):
        best_reachable(log, [FIRST, date(2026, 1, 9)])


def test_refuses_another_log(tmp_path):
    write_day_partitions(iter([(FIRST, pa.table({"click": [1]}))]), tmp_path / "log")
    with pytest.raises(DataError, match="expected a simulated log, which has true probabilities"):
        best_reachable(tmp_path / "log")
    with pytest.raises(DataError, match="Received: 'no days'"):
        best_reachable(tmp_path)
