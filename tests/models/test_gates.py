"""What the gates hold and what they let pass, on simulated requests whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlenv.checks.findings import Finding, Verdict
from mlenv.composition import from_plain
from mlenv.config import BoundsConfig, GatesConfig
from mlenv.errors import Problems
from mlenv.models.bootstrap import Floats, TaskRows
from mlenv.models.gates import (
    Cost,
    GateVerdict,
    Loss,
    PairedRows,
    SegmentColumn,
    judge_calibration,
    judge_cost,
    judge_data,
    judge_gain,
    judge_limits,
    judge_missing,
    judge_regression,
    measure,
)

CONFIG = GatesConfig(resamples=100)
NUM_REQUESTS, PER_REQUEST = 1500, 4


class World:
    """Requests with a truth; models are truths with noise of their own."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        num_rows = NUM_REQUESTS * PER_REQUEST
        self.requests = np.repeat(np.arange(NUM_REQUESTS), PER_REQUEST)
        self.logits = self.random.normal(-1.5, 1.2, num_rows) + self.random.normal(0, 0.5, NUM_REQUESTS)[self.requests]
        self.labels = (self.random.random(num_rows) < sigmoid(self.logits)).astype(float)
        self.device = self.random.choice(3, num_rows, p=[0.6, 0.3, 0.1])

    def model(self, noise: float) -> Floats:
        """Logits of a model: the truth, shrunk as a calibrated model would shrink it, and noise."""
        return self.logits + self.random.normal(0, noise, len(self.logits)) - noise**2 / 2 * 0.4

    def rows(self, challenger: Floats, champion: Floats | None) -> PairedRows:
        predictions = tuple(sigmoid(logits) for logits in (challenger, champion) if logits is not None)
        task = TaskRows(self.labels, np.ones(len(self.labels)), predictions, self.requests, NUM_REQUESTS)
        return PairedRows(tasks={"click": task}, segments={"click": {"device": SegmentColumn(["phone", "desktop", "tablet"], self.device)}})


def sigmoid(logits: Floats) -> Floats:
    return 1 / (1 + np.exp(-logits))


def judge(rows: PairedRows, config: GatesConfig = CONFIG) -> GateVerdict:
    """All gates that look at predictions."""
    figures = measure(rows, config)
    judgements = [*judge_calibration(figures, config)]
    if any(len(task.predictions) > 1 for task in rows.tasks.values()) or rows.lost_tasks:
        judgements += [*judge_regression(figures, rows.lost_tasks, config), *judge_gain(figures, config)]
    return GateVerdict(judgements=judgements)


def held(verdict: GateVerdict) -> set[tuple[str, str]]:
    return {(one.gate, one.subject) for one in verdict.failures}


def test_a_better_model_passes_and_a_worse_one_is_held() -> None:
    world = World(0)
    good, bad = world.model(0.1), world.model(0.8)
    assert judge(world.rows(good, bad)).failures == []
    verdict = judge(world.rows(bad, good))
    assert {("regression", "click/auc"), ("regression", "click/normalized_entropy"), ("gain", "all metrics")} <= held(verdict)
    detail = next(one.detail for one in verdict.failures if one.subject == "click/auc")
    assert "gain -0.0" in detail
    assert "margin 0.002" in detail


def test_a_better_order_with_predictions_too_high_is_held() -> None:
    world = World(1)
    challenger, champion = world.model(0.1), world.model(0.8)
    low, high = -2.0, 2.0
    for _ in range(40):  # the shift that makes the calibration 1.2
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(challenger + middle).sum() / world.labels.sum() < 1.2 else (low, middle)
    verdict = judge(world.rows(challenger + low, champion))
    assert ("calibration", "click/calibration") in held(verdict)
    assert ("regression", "click/calibration") in held(verdict)
    assert next(one for one in verdict.judgements if one.gate == "gain").is_passed  # it is better in AUC
    assert not {"click/auc", "click/auc@device=phone"} & {subject for _, subject in held(verdict)}


def test_better_over_all_and_worse_in_one_segment_is_held() -> None:
    world = World(2)
    champion = world.model(1.2)
    challenger = np.where(world.device == 1, world.model(2.0), world.model(0.05))
    verdict = judge(world.rows(challenger, champion))
    assert held(verdict) == {("regression", "click/auc@device=desktop"), ("regression", "click/normalized_entropy@device=desktop")}
    assert [one.is_passed for one in verdict.judgements if one.gate == "gain"] == [True]


def test_another_seed_is_seldom_promoted() -> None:
    """Forty pairs of models of the same quality: at most 5 % may pass by noise."""
    promoted = 0
    for seed in range(40):
        world = World(100 + seed)
        promoted += judge(world.rows(world.model(0.3), world.model(0.3))).is_passed
    assert promoted <= 2


def test_an_equal_model_passes_where_that_is_enough() -> None:
    world = World(3)
    rows = world.rows(world.model(0.3), world.model(0.3))
    assert held(judge(rows)) == {("gain", "all metrics")}
    assert judge(rows, replace(CONFIG, needs_gain=False)).is_passed
    same = world.model(0.3)
    assert held(judge(world.rows(same, same))) == {("gain", "all metrics")}


def test_a_first_version_is_judged_by_itself() -> None:
    world = World(4)
    assert judge(world.rows(world.model(0.1), None)).is_passed
    verdict = judge(world.rows(world.model(0.1) + 0.5, None))
    assert ("calibration", "click/calibration") in held(verdict)


def test_calibration_far_from_1_is_no_reason_to_keep_one_that_is_further() -> None:
    world = World(5)
    near, far = world.model(0.1) + 0.3, world.model(0.8) + 0.9
    assert judge(world.rows(near, far)).is_passed
    assert ("calibration", "click/calibration") in held(judge(world.rows(near, None)))


def test_lost_tasks_and_rows_that_say_nothing_are_held() -> None:
    world = World(6)
    rows = replace(world.rows(world.model(0.1), world.model(0.8)), lost_tasks=["conversion"])
    assert held(judge(rows)) == {("regression", "conversion")}
    world.labels[:] = 0
    assert ("regression", "all metrics") in held(judge(world.rows(world.model(0.1), world.model(0.8))))


def test_small_segments_are_not_judged() -> None:
    world = World(7)
    figures = measure(world.rows(world.model(0.1), world.model(0.8)), replace(CONFIG, least_labels=500))
    assert {figure.segment for figure in figures} == {"", "device=phone"}
    assert {figure.metric for figure in figures if not figure.segment} == {"auc", "grouped_auc", "normalized_entropy", "calibration"}


def test_absolute_limits() -> None:
    metrics = {"click/auc": 0.7, "click/normalized_entropy": 0.95, "conversion/auc": 0.6, "conversion/normalized_entropy": float("nan")}
    config = GatesConfig(limits={"normalized_entropy": BoundsConfig(at_most=1), "click/auc": BoundsConfig(at_least=0.75, at_most=0.9)})
    found = {one.subject: (one.is_passed, one.detail) for one in judge_limits(metrics, ("click", "conversion"), config)}
    assert found == {
        "click/normalized_entropy": (True, "0.95, has to be at most 1"),
        "conversion/normalized_entropy": (False, "nan, has to be at most 1"),
        "click/auc": (False, "0.7, has to be at least 0.75 and at most 0.9"),
    }


def test_cost_missing_features_and_data() -> None:
    config = GatesConfig(size_bytes=1000)
    passed = [one.is_passed for one in judge_cost(Cost(milliseconds=3, bytes=900), Cost(milliseconds=1.9, bytes=500), config)]
    assert passed == [False, True]  # 1.58 times as slow
    assert [one.is_passed for one in judge_cost(Cost(milliseconds=3, bytes=1100), None, config)] == [True, False]
    losses = [
        Loss(features="user features", task="click", whole=0.8, without=0.76, champion=0.765),
        Loss(features="item features", task="click", whole=0.8, without=0.76, champion=0.775),
        Loss(features="context features", task="click", whole=0.8, without=0.74, champion=0.6),
        Loss(features="request features", task="click", whole=0.8, without=0.76, champion=None),
    ]
    assert [one.is_passed for one in judge_missing(losses, config)] == [True, False, False, True]
    finding = Finding("fail", "psi", "price", 0.5, 0.25, "it moved")
    assert [(one.subject, one.is_passed) for one in judge_data(Verdict([finding]))] == [("psi of price", False)]
    assert [one.is_passed for one in judge_data(Verdict([replace(finding, severity="warn")]))] == [True]


def test_wrong_gates_are_named_together() -> None:
    with pytest.raises(Problems, match=r"(?s)calibration.*confidence|confidence.*calibration") as problems:
        from_plain({"calibration": "much", "confidence": "no", "limits": {"auc": {}}}, GatesConfig, "gates.yaml")
    assert "limits.auc.at_least" in str(problems.value)
    with pytest.raises(Problems, match="did you mean 'auc'"):
        from_plain({"margins": {"acu": 0.1, "calibration": -1}}, GatesConfig, "gates.yaml")
