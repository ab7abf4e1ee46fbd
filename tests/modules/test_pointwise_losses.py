from __future__ import annotations

import math

import pytest
import torch

from mlenv.errors import ConfigError
from mlenv.modules import BinaryCrossEntropyConfig, FocalLossConfig, weighted_binary_cross_entropy


def one(config, logit, label):
    column = [torch.tensor([[value]], dtype=torch.float64) for value in (logit, label, 1.0)]
    return config.build()(*column).item()


@pytest.mark.parametrize("logit", [-3.0, 0.2, 4.0])
@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_values(logit, label):
    p = 1 / (1 + math.exp(-logit))
    smooth = 0.8 * label + 0.1
    expected = -smooth * math.log(p) - (1 - smooth) * math.log(1 - p)
    assert one(BinaryCrossEntropyConfig(label_smoothing=0.2), logit, label) == pytest.approx(expected, rel=1e-9)
    focal = -0.25 * label * (1 - p) ** 1.5 * math.log(p) - 0.75 * (1 - label) * p**1.5 * math.log(1 - p)
    assert one(FocalLossConfig(gamma=1.5, alpha=0.25), logit, label) == pytest.approx(focal, rel=1e-9)
    plain = one(BinaryCrossEntropyConfig(), logit, label)
    assert one(FocalLossConfig(gamma=0), logit, label) == pytest.approx(plain, rel=1e-9)
    assert one(FocalLossConfig(gamma=0, alpha=0.5), logit, label) == pytest.approx(plain / 2, rel=1e-9)


def test_the_mean_is_weighted_however_small_the_weights():
    logits, labels = torch.tensor([[1.0], [-2.0]]), torch.tensor([[1.0], [1.0]])
    whole = weighted_binary_cross_entropy(logits, labels, torch.tensor([[1.0], [3.0]]))
    torch.testing.assert_close(weighted_binary_cross_entropy(logits, labels, torch.tensor([[1e-20], [3e-20]])), whole)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (BinaryCrossEntropyConfig, {"label_smoothing": 1.0}),
        (BinaryCrossEntropyConfig, {"label_smoothing": -0.1}),
        (FocalLossConfig, {"gamma": -1.0}),
        (FocalLossConfig, {"gamma": math.inf}),
        (FocalLossConfig, {"alpha": 0.0}),
        (FocalLossConfig, {"alpha": 1.0}),
    ],
)
def test_options_that_cannot_work_are_refused(config, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        config(**options)
