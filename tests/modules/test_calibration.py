"""Calibrators against scikit-learn, scipy's minimizer and values by hand; what they refuse; how they compile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from mlenv.errors import ConfigError, DataError
from mlenv.modules import (
    AffineCalibrator,
    HistogramConfig,
    IsotonicConfig,
    LogisticConfig,
    NegativeSamplingConfig,
    PlattConfig,
    SegmentCalibrator,
    TemperatureConfig,
)
from mlenv.modules.isotonic_calibration import less_steep

ALL = [
    TemperatureConfig(),
    PlattConfig(),
    IsotonicConfig(),
    HistogramConfig(num_bins=7),
    LogisticConfig(segments=("place", "device")),
    LogisticConfig(segments=("place", "device"), segment_scales=True),
    NegativeSamplingConfig(rate=0.1),
]
FITTED = [config for config in ALL if config.needs_labels]
NAMES = [f"{type(config).__name__}{number}" for number, config in enumerate(ALL)]


def held_out(seed=0, rows=3000, tied=False):
    """Logits that are too large and too high, by segment differently; a tenth of the rows is hidden."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.0, 2.0, rows).astype(np.float32).astype(np.float64)
    if tied:
        logits = np.round(logits * 2) / 2
    segments = rng.integers(0, 4, (rows, 2))
    truth = sigmoid(0.6 * logits - 0.4 + np.array([0.0, 0.5, -0.5, 0.2])[segments[:, 0]])
    labels = (rng.random(rows) < truth).astype(np.float64)
    return logits, labels, rng.choice([0.0, 0.5, 1.0, 2.0], rows, p=[0.1, 0.2, 0.5, 0.2]), segments


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def predictions(calibrator, logits, segments=None):
    inputs = [torch.from_numpy(np.asarray(logits, np.float32))]
    if isinstance(calibrator, SegmentCalibrator):
        inputs.append(torch.from_numpy(segments))
    found = calibrator(*inputs)
    assert found.dtype == torch.float32
    return found.double().numpy()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_isotonic_equals_scikit_learn(seed, tied):
    logits, labels, weights, _ = held_out(seed, tied=tied)
    counted = weights > 0
    expected = IsotonicRegression(out_of_bounds="clip").fit(logits[counted], labels[counted], sample_weight=weights[counted])
    points = np.concatenate([logits, np.random.default_rng(2).normal(-1, 5, 1000).astype(np.float32).astype(np.float64)])
    found = predictions(IsotonicConfig(max_slope=None).fit(logits, labels, weights), points)
    np.testing.assert_allclose(found, expected.predict(points), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_platt_equals_scikit_learn(seed):
    logits, labels, weights, _ = held_out(seed)
    expected = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(logits[:, None], labels, sample_weight=weights)
    calibrator = PlattConfig().fit(logits, labels, weights)
    assert calibrator.scale.item() == pytest.approx(expected.coef_.item(), abs=1e-6)
    assert calibrator.offset.item() == pytest.approx(expected.intercept_.item(), abs=1e-6)
    np.testing.assert_allclose(predictions(calibrator, logits), expected.predict_proba(logits[:, None])[:, 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("segment_scales", [False, True])
def test_logistic_is_the_minimum_of_its_loss(segment_scales):
    logits, labels, weights, segments = held_out(rows=800)
    config = LogisticConfig(segments=("place", "device"), ridge=2.0, segment_scales=segment_scales)

    def tables(coefficients):  # code 0 has no terms
        padded = np.concatenate([np.zeros((2, 2, 1)), coefficients[2:].reshape(2, 2, 3)], axis=2)
        return coefficients[0], coefficients[1], padded[0] * segment_scales, padded[1]

    def loss(coefficients):
        scale, offset, scales, offsets = tables(coefficients)
        slope = scale + scales[0, segments[:, 0]] + scales[1, segments[:, 1]]
        calibrated = slope * logits + offset + offsets[0, segments[:, 0]] + offsets[1, segments[:, 1]]
        return weights @ (np.logaddexp(0, calibrated) - labels * calibrated) + config.ridge * (coefficients[2:] ** 2).sum() / 2

    best = minimize(loss, np.zeros(14), method="BFGS", options={"gtol": 1e-4})
    calibrator = config.fit(logits, labels, weights, segments)
    for found, expected in zip((calibrator.scale, calibrator.offset, calibrator.scales, calibrator.offsets), tables(best.x), strict=True):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    assert (
        loss(np.concatenate([[calibrator.scale, calibrator.offset], calibrator.scales[:, 1:].ravel(), calibrator.offsets[:, 1:].ravel()]))
        <= best.fun
    )


def test_temperature_is_the_best_scale():
    logits, labels, weights, _ = held_out()
    found = TemperatureConfig().fit(logits, labels, weights)
    best = minimize(lambda scale: weights @ (np.logaddexp(0, scale * logits) - labels * scale * logits), [1.0], options={"gtol": 1e-6})
    assert found.scale.item() == pytest.approx(best.x.item(), abs=1e-5)
    assert found.offset.item() == 0


def test_histogram_by_hand():
    logits = np.array([3.0, 1.0, 2.0, 2.0, 4.0, 9.0])
    labels, weights = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 1.0]), np.array([1.0, 2.0, 1.0, 1.0, 3.0, 0.0])
    calibrator = HistogramConfig(num_bins=2).fit(logits, labels, weights)  # the half of the weight lies at the end of the twos
    assert calibrator.edges.tolist() == [2.5]
    assert calibrator.predictions.tolist() == [0.25, 1.0]
    assert predictions(calibrator, [-5, 2, 2.5, 9]) == pytest.approx([0.25, 0.25, 1.0, 1.0], abs=2e-7)


def test_isotonic_by_hand():
    logits, labels = np.array([0.0, 1.0, 2.0, 3.0, 4.0]), np.array([0.0, 1.0, 0.0, 0.0, 1.0])
    calibrator = IsotonicConfig().fit(logits, labels, np.array([1.0, 1.0, 1.0, 2.0, 1.0]))
    assert calibrator.thresholds.tolist() == [0, 1, 3, 4]
    assert calibrator.predictions.tolist() == [0, 0.25, 0.25, 1]
    assert predictions(calibrator, [-9, 0.5, 1, 2, 3.5, 9]) == pytest.approx([1e-7, 0.125, 0.25, 0.25, 0.625, 1 - 1e-7], abs=1e-7)


def test_a_jump_becomes_a_ramp_by_hand():
    jump = np.array([0.0, 1.0, 1.0 + 2**-40, 2.0]), np.array([0.25, 0.25, 0.75, 0.75])
    thresholds, values = less_steep(*jump, 2.0)  # one of the two curves rises from 0.75 to 1, the other to 1.25
    assert np.interp([0, 0.75, 1, 1.25, 2], thresholds, values) == pytest.approx([0.25, 0.25, 0.5, 0.75, 0.75], abs=1e-9)
    at_the_ends = less_steep(np.array([0.0, 0.1]), np.array([0.0, 1.0]), 1.0)
    assert np.interp([-1, -0.9, 0.05, 1, 1.1], *at_the_ends) == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-9)
    gentle = np.array([0.0, 1.0, 3.0]), np.array([0.0, 0.25, 1.0])
    assert [part.tolist() for part in less_steep(*gentle, 0.5)] == [part.tolist() for part in gentle]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_curve_is_as_steep_as_it_may_be_and_as_the_slow_version(seed):
    rng = np.random.default_rng(seed)
    thresholds = np.round(np.sort(rng.choice(1000, 12, replace=False)) / 1000, 3)
    values = np.sort(rng.random(12))
    grid = np.arange(-2000, 3001) / 1000  # holds every corner
    curve = np.interp(grid, thresholds, values)
    ramp = 1.5 * np.maximum(grid[:, None] - grid, 0)
    below, above = (curve + ramp).min(1), (curve - ramp.T).max(1)
    found = np.interp(grid, *less_steep(thresholds, values, 1.5))
    np.testing.assert_allclose(found, (below + above) / 2, atol=1e-12)
    assert (np.diff(found) >= -1e-12).all()
    assert np.diff(found).max() <= 1.5e-3 + 1e-12


def test_isotonic_moves_little_when_a_logit_does_and_is_as_good_on_other_rows():
    logits, labels, weights, _ = held_out(rows=30_000)
    calibrator, exact = (IsotonicConfig(max_slope=slope).fit(logits, labels, weights) for slope in (1.0, None))
    slopes = np.diff(calibrator.predictions.numpy()) / np.diff(calibrator.thresholds.numpy())
    assert slopes.max() <= 1 + 1e-6
    assert weights @ predictions(calibrator, logits) == pytest.approx(weights @ labels, rel=3e-4)
    others, their_labels, their_weights, _ = held_out(seed=1, rows=30_000)
    squares = [their_weights @ (predictions(one, others) - their_labels) ** 2 for one in (calibrator, exact)]
    assert squares[0] <= squares[1]
    small = predictions(IsotonicConfig().fit(logits / 1000, labels, weights), logits / 1000)  # as steep, seen from its logits
    np.testing.assert_allclose(small, predictions(calibrator, logits), atol=0.02)


def test_negative_sampling_is_the_formula():
    sampled = np.array([0.01, 0.2, 0.5, 0.9])
    expected = sampled / (sampled + (1 - sampled) / 0.05)
    calibrator = NegativeSamplingConfig(rate=0.05).fit(*np.zeros((3, 0)))
    assert predictions(calibrator, np.log(sampled / (1 - sampled))) == pytest.approx(expected, rel=1e-6)


def test_unseen_values_and_nulls_get_the_global_terms():
    logits, labels, weights, segments = held_out()
    calibrator = LogisticConfig(segments=("place", "device"), segment_scales=True).fit(logits, labels, weights, segments)
    codes = np.zeros((len(logits), 2), np.int64)
    expected = predictions(AffineCalibrator(calibrator.scale, calibrator.offset), logits)
    np.testing.assert_array_equal(predictions(calibrator, logits, codes), expected)


def test_every_segment_is_right_on_average():
    logits, labels, weights, segments = held_out(rows=20_000)
    found = predictions(LogisticConfig(segments=("place", "device"), ridge=1e-6).fit(logits, labels, weights, segments), logits, segments)
    for column in segments.T:
        for value in range(1, 4):
            rows = column == value
            assert weights[rows] @ found[rows] == pytest.approx(weights[rows] @ labels[rows], rel=1e-4)


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_hidden_rows_change_nothing_and_fits_repeat_to_the_bit(config):
    logits, labels, weights, segments = held_out()
    counted = weights > 0
    logits[~counted], labels[~counted] = np.nan, 7
    with_hidden = config.fit(logits, labels, weights, segments).state_dict()
    without = config.fit(logits[counted], labels[counted], weights[counted], segments[counted]).state_dict()
    for name, buffer in with_hidden.items():
        assert buffer.dtype == torch.float64
        assert torch.equal(buffer, without[name]), name


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_a_calibrator_is_its_buffers(config):
    logits, labels, weights, segments = held_out()
    calibrator = config.fit(logits, labels, weights, segments)
    again = config.calibrator(**{name: buffer.tolist() for name, buffer in calibrator.state_dict().items()})
    assert type(again) is type(calibrator)
    np.testing.assert_array_equal(predictions(again, logits, segments), predictions(calibrator, logits, segments))


@pytest.mark.parametrize("config", FITTED, ids=[name for name in NAMES if "Negative" not in name])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_is_refused(config, label):
    logits, labels, weights, segments = held_out(rows=50)
    with pytest.raises(DataError, match=r"labels: expected examples of both classes\. Received: '\d+ examples, \d+ of them positive'"):
        config.fit(logits, np.full_like(labels, label), weights, segments)
    with pytest.raises(DataError, match="0 examples"):
        config.fit(logits, labels, np.zeros_like(weights), segments)
    with pytest.raises(DataError, match="0 examples"):
        config.fit(logits[:0], labels[:0], weights[:0], segments[:0])
    with pytest.raises(DataError, match="logits: expected finite numbers"):
        config.fit(np.full_like(logits, np.nan), labels, np.ones_like(weights), segments)


@pytest.mark.parametrize("config", [PlattConfig(), LogisticConfig(segments=("place", "device"))], ids=["platt", "logistic"])
def test_logits_without_a_best_slope_are_refused(config):
    _, labels, _, segments = held_out(rows=50)
    for logits in (np.full(50, 0.3), 2 * labels - 1, 1 - 2 * labels):
        with pytest.raises(DataError, match="logits that overlap between the classes"):
            config.fit(logits, labels, np.ones(50), segments)


def test_a_temperature_that_does_not_exist_is_refused():
    labels = np.array([0.0, 1.0, 1.0, 0.0])
    with pytest.raises(DataError, match="logits of either sign"):
        TemperatureConfig().fit(np.array([-1.0, 1.0, 2.0, 0.0]), labels, np.ones(4))
    with pytest.raises(DataError, match="expected logits that rise with the labels"):
        TemperatureConfig().fit(np.array([1.0, -1.0, -2.0, -0.1]), labels, np.ones(4))


@pytest.mark.parametrize("config", [IsotonicConfig(), HistogramConfig()], ids=["isotonic", "histogram"])
def test_equal_logits_give_the_base_rate(config):
    calibrator = config.fit(np.full(4, 0.3), np.array([0.0, 1.0, 0.0, 0.0]), np.ones(4))
    assert predictions(calibrator, [-9.0, 0.3, 9.0]) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: LogisticConfig(segments=()), "segments"),
        (lambda: LogisticConfig(segments=("a", "a")), "segments"),
        (lambda: LogisticConfig(segments=("a",), ridge=0.0), "ridge"),
        (lambda: HistogramConfig(num_bins=0), "num_bins"),
        (lambda: IsotonicConfig(max_slope=0.0), "max_slope"),
        (lambda: NegativeSamplingConfig(rate=0.0), "rate"),
        (lambda: NegativeSamplingConfig(rate=float("nan")), "rate"),
    ],
)
def test_bad_settings_are_refused(build, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        build()


def modules():
    logits, labels, weights, segments = held_out(rows=500)
    for config in ALL:
        inputs = [torch.from_numpy(logits).float()]
        if config.segments:
            inputs.append(torch.from_numpy(segments))
        yield config.fit(logits, labels, weights, segments), tuple(inputs)


@pytest.mark.parametrize("case", list(modules()), ids=NAMES)
class TestModule:
    def test_compiles_without_a_graph_break(self, case):
        module, inputs = case
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs), module(*inputs))

    def test_exports_with_a_dynamic_batch(self, case):
        module, inputs = case
        program = torch.export.export(module, inputs, dynamic_shapes=[{0: torch.export.Dim("batch")} for _ in inputs])
        for rows in (1, 3):
            cut = [values[:rows] for values in inputs]
            assert torch.equal(program.module()(*cut), module(*cut))

    def test_takes_any_logits(self, case):
        module, (logits, *segments) = case
        extreme = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30])
        codes = [values[:5] for values in segments]
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16):
                found = module(extreme.to(dtype), *codes)
            assert found.dtype == torch.float32
            assert ((found > 0) & (found < 1)).all()
        assert module(logits[:0], *(values[:0] for values in segments)).shape == (0,)
        assert (module(logits, *segments) - module(logits.bfloat16(), *segments)).abs().max() < 0.2
