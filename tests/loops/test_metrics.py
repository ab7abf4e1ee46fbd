"""Streaming metrics against scikit-learn, values by hand and slow obvious versions; parts merge to the whole."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from mlenv.errors import DataError
from mlenv.loops.metrics import BinaryMetrics, ReliabilityCurve

TASKS = ("click", "conversion")
METRICS = {"auc", "grouped_auc", "log_loss", "normalized_entropy", "calibration", "ece", "base_rate", "examples"}


class Log:
    """Rows of a small ranking log whose labels follow the predictions."""

    def __init__(self, rows: int, seed: int, *, spread: float = 1.3, segments: Sequence[str | None] = ("feed", "search", None)) -> None:
        random = np.random.default_rng(seed)
        logits = random.normal((-1, -3), spread, (rows, 2))
        self.predictions = torch.tensor(1 / (1 + np.exp(-logits)), dtype=torch.float32)
        self.labels = (torch.tensor(random.random((rows, 2))) < self.predictions).float()
        self.weights = torch.tensor(random.choice([0, 0.3, 1, 2.5], (rows, 2)), dtype=torch.float32)
        self.segment = random.choice(np.array(segments, dtype=object), rows)
        self.request = np.sort(random.integers(0, max(1, rows // 6), rows))

    def metrics(self, start: int = 0, stop: int | None = None, batch_size: int = 4096) -> BinaryMetrics:
        metrics = BinaryMetrics(TASKS, segments=("placement",), request="request")
        end = len(self.labels) if stop is None else stop
        for first in range(start, end, batch_size):
            batch = slice(first, min(first + batch_size, end))
            metadata = pa.record_batch({"placement": pa.array(self.segment[batch], pa.string()), "request": pa.array(self.request[batch])})
            metrics.update(self.predictions[batch], self.labels[batch], self.weights[batch], metadata)
        return metrics

    def of_task(
        self, task: int, segment: str | None = "all"
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], list[int]]:
        """Predictions, labels, weights and requests of the examples that count."""
        counted = (self.weights[:, task].numpy() > 0) & ((self.segment == segment) if segment != "all" else True)
        arrays = (tensor[:, task].double().numpy()[counted] for tensor in (self.predictions, self.labels, self.weights))
        return *arrays, self.request[counted].tolist()


def only(metrics: BinaryMetrics, metric: str, task: str = "click") -> float:
    return metrics.compute()[f"{task}/{metric}"]


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def measured(predictions: Tensor, labels: Tensor, weights: Tensor | None = None) -> dict[str, float]:
    metrics = BinaryMetrics(("click",))
    metrics.update(predictions, labels, torch.ones_like(labels) if weights is None else weights)
    return {key.removeprefix("click/"): value for key, value in metrics.compute().items()}


def obvious_grouped_auc(predictions: NDArray[np.float64], labels: NDArray[np.float64], requests: list[int]) -> float:
    total = size = 0.0
    for request in set(requests):
        rows = [row for row, other in enumerate(requests) if other == request]
        pairs = [(predictions[i], predictions[j]) for i in rows for j in rows if labels[i] > labels[j]]
        if pairs:
            total += len(rows) * sum(1.0 if high > low else 0.5 if high == low else 0.0 for high, low in pairs) / len(pairs)
            size += len(rows)
    return total / size


def obvious_calibration_error(predictions: NDArray[np.float64], labels: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    order = np.argsort(predictions)
    shares = np.cumsum(weights[order]) / weights.sum()
    error = 0.0
    for number in range(20):
        rows = order[(shares > number / 20) & (shares <= (number + 1) / 20)]
        error += abs(float(weights[rows] @ (predictions[rows] - labels[rows]))) / weights.sum()
    return error


@pytest.mark.parametrize("segment", ["all", "feed", None])
@pytest.mark.parametrize("task", [0, 1])
def test_every_metric_equals_an_independent_computation(task: int, segment: str | None) -> None:
    log = Log(30_000, seed=1)
    suffix = "" if segment == "all" else f"@placement={segment or 'null'}"
    computed = log.metrics().compute()
    found = {metric: computed[f"{TASKS[task]}/{metric}{suffix}"] for metric in METRICS}
    predictions, labels, weights, requests = log.of_task(task, segment)
    base_rate = np.average(labels, weights=weights)
    loss = log_loss(labels, predictions, sample_weight=weights)
    assert found["examples"] == len(labels)
    assert found["base_rate"] == pytest.approx(base_rate, rel=1e-12)
    assert found["log_loss"] == pytest.approx(loss, rel=1e-9)
    assert found["normalized_entropy"] == pytest.approx(
        loss / log_loss(labels, np.full(len(labels), base_rate), sample_weight=weights), rel=1e-9
    )
    assert found["calibration"] == pytest.approx(weights @ predictions / (weights @ labels), rel=1e-12)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, predictions, sample_weight=weights), abs=1e-5)
    assert found["ece"] == pytest.approx(obvious_calibration_error(predictions, labels, weights), abs=2e-3)
    if segment == "feed":  # the obvious version is quadratic
        assert found["grouped_auc"] == pytest.approx(obvious_grouped_auc(predictions, labels, requests), rel=1e-12)


def test_the_keys_are_one_per_task_metric_and_segment_value() -> None:
    suffixes = ("", "@placement=feed", "@placement=search", "@placement=null")
    assert set(Log(500, seed=2).metrics().compute()) == {
        f"{task}/{metric}{suffix}" for task in TASKS for metric in METRICS for suffix in suffixes
    }


def test_values_by_hand() -> None:
    found = measured(column(0.2, 0.4, 0.4, 0.8), column(0, 1, 0, 1), column(1, 1, 1, 3))
    assert found["auc"] == pytest.approx((1 * 1.5 + 3 * 2) / (4 * 2))
    assert found["calibration"] == pytest.approx((0.2 + 0.4 + 0.4 + 3 * 0.8) / 4)
    assert found["log_loss"] == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.6) + 3 * math.log(0.8)) / 6)
    assert found["base_rate"] == pytest.approx(4 / 6)
    assert found["ece"] == pytest.approx((0.2 + 2 * abs(0.4 - 0.5) + 3 * 0.2) / 6)
    assert found["examples"] == 4
    assert "grouped_auc" not in found


def test_a_model_that_knows_the_base_rate_only_has_normalized_entropy_one_and_auc_one_half() -> None:
    found = measured(column(*[0.25] * 8), column(1, 1, 0, 0, 0, 0, 0, 0))
    assert found["normalized_entropy"] == pytest.approx(1)
    assert found["auc"] == 0.5
    assert found["ece"] == pytest.approx(0)


def test_grouped_auc_weighs_requests_by_size_and_skips_those_of_one_class_or_without_name() -> None:
    metrics = BinaryMetrics(("click",), request="request")
    request = pa.array(["a", "a", "b", "b", "b", "only positives", None, None])
    predictions, labels = column(0.9, 0.1, 0.3, 0.3, 0.2, 0.1, 0.1, 0.9), column(0, 1, 1, 0, 0, 1, 1, 0)
    metrics.update(predictions, labels, torch.ones(8, 1), pa.record_batch({"request": request}))
    assert only(metrics, "grouped_auc") == pytest.approx((2 * 0.0 + 3 * 0.75) / 5)


@pytest.mark.parametrize(
    "values", [[1, 1, 2, 2], ["1", "1", "2", "2"], pa.array(["x", "x", "y", "y"]).dictionary_encode(), [0.5, 0.5, 1.5, 1.5]]
)
def test_requests_and_segments_of_any_type(values: object) -> None:
    metrics = BinaryMetrics(("click",), segments=("request",), request="request")
    metrics.update(column(0.1, 0.2, 0.9, 0.8), column(0, 1, 0, 1), torch.ones(4, 1), pa.record_batch({"request": pa.array(values)}))
    assert only(metrics, "grouped_auc") == 0.5
    assert sum("click/auc@request=" in key for key in metrics.compute()) == 2


@given(rows=st.integers(0, 60), cuts=st.lists(st.integers(0, 60), max_size=4), seed=st.integers(0, 1_000), through_state=st.booleans())
def test_parts_merge_to_the_whole(rows: int, cuts: list[int], seed: int, through_state: bool) -> None:
    log = Log(rows, seed)
    whole = log.metrics(batch_size=7).compute()
    edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    merged = BinaryMetrics(TASKS, segments=("placement",), request="request")
    for start, stop in pairwise(edges):
        part = log.metrics(start, stop)
        before = part.compute()
        merged.merge(BinaryMetrics.from_state(part.state()) if through_state else part)
        np.testing.assert_equal(part.compute(), before)
    found = merged.compute()
    assert found.keys() == whole.keys()
    for key, value in whole.items():
        if "/examples" in key or "/grouped_auc" in key:
            np.testing.assert_equal(found[key], value)
        else:
            np.testing.assert_allclose(found[key], value, rtol=1e-12, err_msg=key)


def test_compaction_on_the_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(2_000, seed=3)
    expected = log.metrics().compute()
    monkeypatch.setattr("mlenv.loops.metrics._PENDING_CELLS", 50)
    found = log.metrics(batch_size=64).compute()
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_state_is_arrays_and_json_that_load_without_pickle() -> None:
    metrics = Log(300, seed=4).metrics()
    state = metrics.state()
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    file.seek(0)
    values = json.loads(json.dumps({name: value for name, value in state.items() if name not in arrays}))
    loaded = BinaryMetrics.from_state({**values, **np.load(file, allow_pickle=False)})
    np.testing.assert_equal(loaded.compute(), metrics.compute())


def test_metrics_of_other_columns_are_not_merged() -> None:
    with pytest.raises(DataError, match=r"metrics to merge.*click"):
        BinaryMetrics(("click",)).merge(BinaryMetrics(("like",)))


def test_hidden_examples_do_not_count_whatever_they_hold() -> None:
    found = measured(column(0.2, math.nan, 0.6), column(0, math.nan, 1), column(1, 0, 1))
    assert found == measured(column(0.2, 0.6), column(0, 1))


@pytest.mark.parametrize(("label", "calibration"), [(0, math.inf), (1, 0.3)])
def test_one_class_has_no_auc_and_no_normalized_entropy(label: int, calibration: float) -> None:
    found = measured(column(0.2, 0.4), column(label, label))
    assert math.isnan(found["auc"])
    assert math.isnan(found["normalized_entropy"])
    assert found["calibration"] == pytest.approx(calibration)
    assert found["base_rate"] == label
    assert math.isfinite(found["log_loss"])


@pytest.mark.parametrize("rows", [0, 3])
def test_a_task_without_examples_is_nan(rows: int) -> None:
    metrics = BinaryMetrics(("click",), segments=("placement",), request="request")
    metadata = pa.record_batch({"placement": pa.array(["feed"] * rows, pa.string()), "request": pa.array([1] * rows, pa.int64())})
    metrics.update(torch.full((rows, 1), 0.5), torch.zeros(rows, 1), torch.zeros(rows, 1), metadata)
    found = metrics.compute()
    assert found.pop("click/examples") == 0
    assert found.pop("click/examples@placement=feed", 0) == 0
    assert all(math.isnan(value) for value in found.values())
    assert metrics.reliability("click") == ReliabilityCurve()
    assert BinaryMetrics(("click",)).compute().keys() >= {"click/auc", "click/examples"}


def test_saturated_predictions_have_a_finite_loss() -> None:
    found = measured(column(0.0, 1.0, 0.0, 1.0), column(0, 1, 1, 0))
    assert found["log_loss"] == pytest.approx(-(math.log(1e-7) + math.log(1 - 1e-7)) / 2)
    assert found["auc"] == 0.5
    assert found["calibration"] == 1


def test_bfloat16_predictions_are_read_as_they_are() -> None:
    predictions = column(0.2, 0.4, 0.9).bfloat16()
    assert measured(predictions, column(0, 1, 1)) == measured(predictions.double(), column(0, 1, 1))


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.5])
def test_a_prediction_that_is_no_probability_is_named(wrong: float) -> None:
    with pytest.raises(DataError, match=r"task 'click', row 1 of the batch.*probability.*diverged"):
        measured(column(0.5, wrong), column(0, 1))


@pytest.mark.parametrize("metadata", [None, pa.record_batch({"other": [1, 2]})])
def test_a_missing_metadata_column_is_named(metadata: pa.RecordBatch | None) -> None:
    with pytest.raises(DataError, match="expected the column 'placement'"):
        BinaryMetrics(("click",), segments=("placement",)).update(column(0.5, 0.5), column(0, 1), torch.ones(2, 1), metadata)


def test_light_values_of_a_wide_segment_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlenv.loops.metrics.MAX_SEGMENT_VALUES", 2)
    metrics = BinaryMetrics(("click",), segments=("item",), request="request")
    item, labels = ["a", "b", "b", "c", "c", "c", "d", "d"], column(0, 1, 0, 1, 0, 0, 0, 1)
    predictions, weights = column(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), column(1, 1, 1, 1, 1, 1, 5, 5)
    metrics.update(predictions, labels, weights, pa.record_batch({"item": item, "request": [1] * 8}))
    found = metrics.compute()
    assert {key.partition("@")[2] for key in found} == {"", "item=c", "item=d", "item=other"}
    others = measured(column(0.1, 0.2, 0.3), column(0, 1, 0))
    assert {key: found[f"click/{key}@item=other"] for key in others} == others
    assert found["click/grouped_auc@item=other"] == 0.5


def test_the_reliability_curve_covers_all_the_weight() -> None:
    log = Log(20_000, seed=5)
    predictions, labels, weights, _ = log.of_task(0)
    curve = log.metrics().reliability("click")
    assert 15 <= len(curve.weights) <= 20
    assert max(curve.weights) < 1.2 * weights.sum() / 20
    assert list(curve.predictions) == sorted(curve.predictions)
    assert sum(curve.weights) == pytest.approx(weights.sum())
    assert np.dot(curve.weights, curve.predictions) == pytest.approx(weights @ predictions)
    assert np.dot(curve.weights, curve.labels) == pytest.approx(weights @ labels)
    assert sum(curve.histogram) == pytest.approx(weights.sum())
    expected = np.histogram(np.minimum(predictions, curve.histogram_edges[-1]), np.array(curve.histogram_edges), weights=weights)[0]
    assert np.abs(np.array(curve.histogram) - expected).sum() < 0.01 * weights.sum()
