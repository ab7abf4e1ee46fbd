"""Requests drawn anew: every draw is what the metrics say of rows repeated so often."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from mlenv.loops.metrics import BinaryMetrics
from mlenv.models.bootstrap import TaskRows, resample, spread


def make_rows(num_rows: int = 300, num_requests: int = 60, seed: int = 0) -> TaskRows:
    random = np.random.default_rng(seed)
    requests = np.sort(random.integers(0, num_requests, num_rows))
    truth = random.beta(2, 4, num_rows)
    labels = (random.random(num_rows) < truth).astype(float)
    first = np.round(truth, 2)  # with ties
    second = np.clip(truth + random.normal(0, 0.2, num_rows), 0.01, 0.99)
    return TaskRows(labels, np.ones(num_rows), (first, second), requests, num_requests)


def test_values_and_draws_are_those_of_the_metrics() -> None:
    rows = make_rows()
    groups = np.random.default_rng(1).integers(0, 3, len(rows.labels))
    overall, by_group = (resample(rows, *of, num_draws=3, seed=5) for of in ((np.zeros(len(groups), int), 1), (groups, 3)))
    assert overall.keys() == {"auc", "normalized_entropy", "calibration", "grouped_auc"}
    random = np.random.default_rng(5)
    for draw in (None, 0, 1, 2):
        counts = np.ones(rows.num_requests, int) if draw is None else np.bincount(random.integers(0, 60, 60), minlength=60)
        copies = np.concatenate([np.repeat(place, counts[request]) for place, request in enumerate(rows.requests)])
        which = np.concatenate([np.arange(counts[request]) for request in rows.requests])  # a request drawn twice is two requests
        for model, predictions in enumerate(rows.predictions):
            metrics = BinaryMetrics(("t",), ("group",), "request")
            named = {
                "group": groups[copies],
                "request": [f"{request}-{copy}" for request, copy in zip(rows.requests[copies], which, strict=True)],
            }
            metadata = pa.RecordBatch.from_pydict({name: pa.array(list(map(str, values))) for name, values in named.items()})
            parts = (torch.from_numpy(values[copies][:, None]) for values in (predictions, rows.labels, rows.weights))
            metrics.update(*parts, metadata)
            expected = metrics.compute()
            for name, found in overall.items():
                value = (found.values if draw is None else found.draws[draw])[model, 0]
                assert value == pytest.approx(expected[f"t/{name}"], abs=5e-4 if "auc" in name else 1e-9)
            for name, found in by_group.items():
                values = (found.values if draw is None else found.draws[draw])[model]
                assert values == pytest.approx(
                    [expected[f"t/{name}@group={group}"] for group in range(3)], abs=5e-3 if name == "auc" else 1e-9
                )


def test_spread_is_that_of_new_samples() -> None:
    """Of a mean of independent requests: its standard error."""
    random = np.random.default_rng(2)
    labels = (random.random(4000) < 0.3).astype(float)
    rows = TaskRows(labels, np.ones(4000), (np.full(4000, 0.3),), np.arange(4000), 4000)
    found = resample(rows, np.zeros(4000, int), 1, num_draws=300)["calibration"]
    expected = np.sqrt(0.7 / 0.3 / 4000)  # of the logarithm of the number of positives
    assert spread(np.log(found.draws))[0, 0] == pytest.approx(expected, rel=0.15)
    # Four rows of one request are one row: the spread doubles.
    rows = TaskRows(np.repeat(labels[:1000], 4), rows.weights, rows.predictions, np.repeat(np.arange(1000), 4), 1000)
    found = resample(rows, np.zeros(4000, int), 1, num_draws=300)["calibration"]
    assert spread(np.log(found.draws))[0, 0] == pytest.approx(2 * expected, rel=0.15)


def test_a_group_without_positives_in_many_draws_has_no_spread() -> None:
    draws = np.array([[1.0, 1.0], [2.0, np.nan], [3.0, np.inf]])
    assert spread(draws)[0] == 1.0
    assert np.isnan(spread(draws)[1])
