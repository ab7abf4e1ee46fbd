from __future__ import annotations

import math

import numpy as np

from mlenv.monitoring.scores import PARTS, ScoreCounts, distance, in_parts, stability


def counts_of(predictions, labels=None, weights=None) -> ScoreCounts:
    predictions = np.asarray(predictions, np.float64)
    zeros = np.zeros(len(predictions))
    return ScoreCounts.of(predictions, zeros if labels is None else np.asarray(labels, float), zeros if weights is None else weights)


def test_counts_are_merged_written_and_read():
    random = np.random.default_rng(0)
    predictions, labels = random.uniform(size=100), random.integers(0, 2, 100)
    weights = random.choice([0.0, 1.0, 2.0], 100)
    whole = counts_of(predictions, labels, weights)
    parts = counts_of(predictions[:30], labels[:30], weights[:30]).merged(counts_of(predictions[30:], labels[30:], weights[30:]))
    read = ScoreCounts.from_plain(parts.to_plain())
    np.testing.assert_array_equal(read.counts, whole.counts)
    assert math.isclose(read.mean, predictions.mean())
    assert math.isclose(read.calibration, (predictions * weights).sum() / (labels * weights).sum())
    assert math.isnan(counts_of([0.5]).calibration)


def test_certain_predictions_are_counted_at_the_ends():
    counts = counts_of([0.0, 1.0, 1e-30]).counts
    assert (counts[0], counts[-1], counts.sum()) == (2, 1, 3)


def test_stability_and_distance_are_those_of_the_formulas():
    now, reference = np.array([50, 30, 20]), np.array([40, 40, 20])
    by_hand = 0.1 * math.log(0.5 / 0.4) + -0.1 * math.log(0.3 / 0.4)
    assert math.isclose(stability(now, reference), by_hand)
    assert stability(np.array([10, 0]), np.array([5, 5])) > 0.5  # an empty part is no infinity
    low, high = counts_of([0.1] * 3 + [0.9]), counts_of([0.1] + [0.9] * 3)
    assert math.isclose(distance(low, high), 0.5)
    assert distance(low, low) == 0


def test_parts_are_tenths_of_the_reference():
    random = np.random.default_rng(1)
    reference, moved = counts_of(random.beta(2, 5, 50_000)), counts_of(random.beta(2.5, 5, 50_000))
    same = counts_of(random.beta(2, 5, 50_000))
    now, before = in_parts(moved, reference)
    assert len(before) == PARTS
    assert before.min() > 0.6 * 5_000
    assert before.max() < 1.4 * 5_000
    assert stability(now, before) > 0.03
    assert stability(*in_parts(same, reference)) < 0.001
