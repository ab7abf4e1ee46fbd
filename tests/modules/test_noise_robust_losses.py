from __future__ import annotations

import math

import pytest
import torch

from mlenv.errors import ConfigError
from mlenv.modules import BinaryCrossEntropyConfig, GeneralizedCrossEntropyConfig, SymmetricCrossEntropyConfig


def one(config, logit, label):
    column = [torch.tensor([[value]], dtype=torch.float64) for value in (logit, label, 1.0)]
    return config.build()(*column).item()


@pytest.mark.parametrize("logit", [-3.0, 0.2, 4.0])
@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_values(logit, label):
    p = 1 / (1 + math.exp(-logit))
    generalized = label * (1 - p**0.7) / 0.7 + (1 - label) * (1 - (1 - p) ** 0.7) / 0.7
    assert one(GeneralizedCrossEntropyConfig(), logit, label) == pytest.approx(generalized, rel=1e-9)
    plain = -label * math.log(p) - (1 - label) * math.log(1 - p)
    assert one(GeneralizedCrossEntropyConfig(q=1e-9), logit, label) == pytest.approx(plain, rel=1e-6)
    absolute = label * (1 - p) + (1 - label) * p
    assert one(GeneralizedCrossEntropyConfig(q=1.0), logit, label) == pytest.approx(absolute, rel=1e-9)
    log_label, log_other = (math.log(part) if part > math.exp(-1) else -1.0 for part in (label, 1 - label))
    reverse = -p * log_label - (1 - p) * log_other
    symmetric = one(SymmetricCrossEntropyConfig(alpha=0.2, beta=3.0, log_zero=-1.0), logit, label)
    assert symmetric == pytest.approx(0.2 * plain + 3 * reverse, rel=1e-9)


def learned(config, labels):
    """Logits of two groups of rows, learned to the end from labels of which a share is wrong."""
    logits = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    optimizer, loss = torch.optim.Adam([logits], lr=0.05), config.build()
    for _ in range(500):
        optimizer.zero_grad()
        loss(logits.repeat_interleave(labels.shape[1], 0), labels.reshape(-1, 1), torch.ones(labels.numel(), 1)).sum().backward()
        optimizer.step()
    return logits.detach().sigmoid().flatten().tolist()


def test_wrong_labels_weigh_less():
    labels = torch.tensor([[1.0] * 8 + [0.0] * 2, [0.0] * 8 + [1.0] * 2], dtype=torch.float64)  # every fifth label is flipped
    plain = learned(BinaryCrossEntropyConfig(), labels)
    assert plain == [pytest.approx(0.8, abs=1e-3), pytest.approx(0.2, abs=1e-3)]
    for config in (GeneralizedCrossEntropyConfig(), SymmetricCrossEntropyConfig()):
        positives, negatives = learned(config, labels)
        assert positives > 0.95
        assert negatives < 0.05


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (GeneralizedCrossEntropyConfig, {"q": 0.0}),
        (GeneralizedCrossEntropyConfig, {"q": 1.1}),
        (SymmetricCrossEntropyConfig, {"alpha": 0.0}),
        (SymmetricCrossEntropyConfig, {"beta": -1.0}),
        (SymmetricCrossEntropyConfig, {"log_zero": 0.0}),
        (SymmetricCrossEntropyConfig, {"log_zero": -math.inf}),
    ],
)
def test_options_that_cannot_work_are_refused(config, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        config(**options)
