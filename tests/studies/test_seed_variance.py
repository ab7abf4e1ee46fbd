"""Differences over seeds: against SciPy, against values by hand, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mlenv.errors import DataError
from mlenv.studies.seed_variance import CONFIDENCE, POWER, difference, sentence

FIRST = [0.7801, 0.7812, 0.7795, 0.7808, 0.7803]
BETTER = [0.7815, 0.7822, 0.7809, 0.7818, 0.7817]
SAME = [0.7805, 0.7804, 0.7800, 0.7809, 0.7797]


def test_paired_differences_by_hand():
    found = difference("click/auc", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0], is_paired=True)  # differences 1, 2, 3
    half = 4.302653 / math.sqrt(3)  # Student's table, two degrees of freedom
    assert found.mean == 2
    assert found.interval == pytest.approx((2 - half, 2 + half), rel=1e-6)
    assert not found.is_real


@pytest.mark.parametrize("is_paired", [True, False])
def test_intervals_and_p_values_are_those_of_scipy(is_paired):
    second = BETTER if is_paired else BETTER[:3]
    expected = stats.ttest_rel(second, FIRST) if is_paired else stats.ttest_ind(second, FIRST, equal_var=False)
    found = difference("click/auc", FIRST, second, is_paired=is_paired, confidence=0.99)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.99)))
    assert found.p_value == pytest.approx(expected.pvalue)


def simulated(generator, effect, num_seeds, *, is_paired, spreads=(1.0, 1.0)):
    """Normal values; paired ones share as much luck as they have of their own."""
    shared = generator.normal(size=num_seeds) if is_paired else 0.0
    first, second = (spread * generator.normal(size=num_seeds) + shared for spread in spreads)
    return difference("m", first, second + effect, is_paired=is_paired)


@pytest.mark.parametrize("is_paired", [True, False])
def test_equal_models_are_told_apart_once_in_twenty_comparisons(is_paired):
    generator = np.random.default_rng(1)
    found = [simulated(generator, 0.0, 5, is_paired=is_paired, spreads=(1.0, 1.5)).is_real for _ in range(3000)]
    assert np.mean(found) == pytest.approx(1 - CONFIDENCE, abs=0.012)  # three standard errors


@pytest.mark.parametrize("is_paired", [True, False])
def test_a_visible_difference_is_seen_four_times_in_five(is_paired):
    generator = np.random.default_rng(2)
    one = simulated(generator, 0.0, 6, is_paired=is_paired)
    # What is visible is in units of the spread that was measured; here the spread is known: sqrt(2).
    effect = one.visible / one.spread * math.sqrt(2) * math.sqrt(one.seeds / 6)
    found = [simulated(generator, effect, 6, is_paired=is_paired).is_real for _ in range(2000)]
    assert np.mean(found) == pytest.approx(POWER, abs=0.03)


def test_as_many_seeds_as_are_said_to_be_needed_show_the_difference():
    """The spread of these differences is 1 and their mean 0.5, so a power table says 34 pairs."""
    differences = np.array([-1.0, 1.0]) / math.sqrt(2) + 0.5
    needed = difference("m", [0.0, 0.0], differences, is_paired=True).seeds_needed
    assert needed == 34
    generator = np.random.default_rng(3)
    found = [difference("m", np.zeros(34), generator.normal(0.5, 1, 34), is_paired=True).is_real for _ in range(1000)]
    assert np.mean(found) == pytest.approx(POWER, abs=0.04)


def test_several_metrics_together_err_as_often_as_one():
    generator = np.random.default_rng(4)

    def any_real(num_metrics):
        confidence = 1 - (1 - CONFIDENCE) / num_metrics
        values = generator.normal(size=(num_metrics, 2, 5))
        return any(difference("m", first, second, is_paired=False, confidence=confidence).is_real for first, second in values)

    assert np.mean([any_real(4) for _ in range(1000)]) < 0.07


def test_sentences():
    found = difference("click/auc", FIRST, BETTER, is_paired=True)
    assert sentence(found, "A", "B", higher_is_better=True) == (
        "B is better than A in click/auc by 0.0012 (95 % interval 0.00097 to 0.0015)."
    )
    assert sentence(found, "A", "B", higher_is_better=False).startswith("A is better than B in click/auc by 0.0012 ")
    text = sentence(difference("click/auc", FIRST, SAME, is_paired=True), "A", "B", higher_is_better=True)
    assert text == (
        "No difference in click/auc can be told from 5 seeds. To see one of 8e-05, as measured, you need about 428 seeds; "
        "5 show one of 0.00099 or more."
    )


def test_seeds_that_change_nothing():
    equal = difference("click/auc", [0.7, 0.7], [0.7, 0.7], is_paired=True)
    assert sentence(equal, "A", "B", higher_is_better=True) == "A and B are equal in click/auc, with every seed."
    assert (equal.p_value, equal.interval) == (1.0, (0.0, 0.0))
    moved = difference("click/auc", [0.7, 0.7], [0.8, 0.8], is_paired=False)
    assert moved.is_real
    assert moved.p_value == 0


def test_one_seed_and_no_numbers_are_refused():
    with pytest.raises(DataError, match=r"at least two seeds of each model\. Received: '5 and 1'"):
        difference("click/auc", FIRST, [0.7], is_paired=False)
    with pytest.raises(DataError, match="a number from every seed"):
        difference("click/auc", [0.7, math.nan], [0.7, 0.8], is_paired=True)
