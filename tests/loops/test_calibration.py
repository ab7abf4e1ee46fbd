"""Calibrators by task: how segment values become codes, what is left out, what a checkpoint keeps of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch

from mlenv.batch import Batch, SparseFeatures
from mlenv.errors import CheckpointError, DataError
from mlenv.loops.calibration import calibrators_from_json, calibrators_to_json, fit_calibrators, predictions_from
from mlenv.modules import AffineCalibrator, IsotonicConfig, LogisticConfig, NegativeSamplingConfig, PlattConfig, TemperatureConfig

TASKS = ("click", "buy")
PLACES = pa.array(["top", "side", None, "rare"])
EMPTY = SparseFeatures((), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), ())


def held_out(rows=4000, batch_size=512):
    """Batches with logits that are 1 too high, on top 2; buy has no positives; rare places do not count."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 1, (rows, 2))
    place = rng.integers(0, 4, rows)
    labels = np.stack([rng.random(rows) < 1 / (1 + np.exp(-(logits[:, 0] - 1 - (place == 0)))), np.zeros(rows)], axis=1)
    weights = np.stack([place != 3, np.ones(rows)], axis=1)
    logits, labels, weights = (torch.from_numpy(values).float() for values in (logits, labels, weights))
    for start in range(0, rows, batch_size):
        part = slice(start, start + batch_size)
        metadata = pa.record_batch({"place": PLACES.take(pa.array(place[part])).dictionary_encode()})
        yield Batch(EMPTY, torch.zeros(len(logits[part]), 0), labels[part], weights[part], metadata=metadata), logits[part]


def test_each_segment_gets_its_own_offset_and_unknown_values_the_global_one():
    fitted = fit_calibrators({"click": LogisticConfig(segments=("place",), ridge=0.01)}, TASKS, held_out())
    assert fitted["click"].kind == "logistic"
    assert set(fitted["click"].segments["place"]) == {"top", "side"}
    metadata = pa.record_batch({"place": ["top", "side", "new", None]})
    found = predictions_from(torch.full((4, 2), 0.5), metadata, TASKS, fitted)
    assert found[:2, 0].logit().tolist() == pytest.approx([-1.5, -0.5], abs=0.3)
    assert found[0, 0] < found[2, 0] == found[3, 0] < found[1, 0]
    assert torch.equal(found[:, 1], torch.sigmoid(torch.full((4,), 0.5)))
    with pytest.raises(DataError, match="expected the column 'place'"):
        predictions_from(torch.zeros(1, 2), None, TASKS, fitted)


def test_a_task_with_too_little_to_fit_on_is_left_out_with_a_warning(caplog):
    fitted = fit_calibrators({"click": PlattConfig(), "buy": IsotonicConfig()}, TASKS, held_out())
    assert list(fitted) == ["click"]
    assert "calibration.buy.labels: expected examples of both classes. Received: '4000 examples, 0 of them positive'" in caplog.text
    assert "The task keeps the sigmoid of its logits." in caplog.text


def test_nothing_is_read_when_nothing_is_fitted():
    def never():
        raise AssertionError
        yield

    fitted = fit_calibrators({"buy": NegativeSamplingConfig(rate=0.5)}, TASKS, never())
    assert predictions_from(torch.zeros(1, 2), None, TASKS, fitted).tolist() == [[0.5, pytest.approx(1 / 3)]]


@pytest.mark.parametrize("config", [TemperatureConfig(), PlattConfig(), IsotonicConfig(), LogisticConfig(segments=("place",))])
def test_what_is_read_back_is_what_was_fitted_to_the_bit(config):
    fitted = fit_calibrators({"click": config}, TASKS, held_out())
    again = calibrators_from_json(calibrators_to_json(fitted), {}, "here")
    assert calibrators_to_json(again) == calibrators_to_json(fitted)
    for batch, logits in held_out():
        before, after = (predictions_from(logits, batch.metadata, TASKS, calibrators) for calibrators in (fitted, again))
        assert torch.equal(before, after)


@dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """Of a team's own."""

    calibrator: ClassVar[type] = AffineCalibrator
    needs_labels: ClassVar[bool] = False
    segments: ClassVar[tuple[str, ...]] = ()

    def fit(self, logits, labels, weights, segments):
        return AffineCalibrator(2.0, 1.0)


def test_code_that_only_a_checkpoint_names_is_not_imported():
    text = calibrators_to_json(fit_calibrators({"click": OwnConfig()}, TASKS, ()))
    assert calibrators_from_json(text, {"click": OwnConfig()}, "here")["click"].module.scale == 2
    with pytest.raises(CheckpointError, match=r"here, click: expected a kind of .*OwnConfig'.*name it in calibration\.click\.kind"):
        calibrators_from_json(text, {}, "here")
