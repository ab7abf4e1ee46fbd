from __future__ import annotations

import pytest
import torch

from mlenv.modules import BinaryCrossEntropyConfig, FakeNegativeWeightedConfig

CLICKS = 20_000
RATES = (0.05, 0.3, 0.7)


def test_values_and_the_gradient():
    logits = torch.tensor([[-1.0], [0.5], [2.0], [0.3]], dtype=torch.float64, requires_grad=True)
    labels, weights = torch.tensor([[1.0], [0.0], [1.0], [0.25]]), torch.tensor([[1.0], [2.0], [0.5], [1.0]])
    p = logits.detach().sigmoid()
    rows = -labels * (1 + p) * p.log() - (1 - labels) * (1 - p) * (1 + p) * (1 - p).log()
    loss = FakeNegativeWeightedConfig().build()(logits, labels, weights)
    torch.testing.assert_close(loss, (rows * weights).sum(0) / weights.sum())
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, (1 + p) * (1 - p) * ((1 - labels) * p - labels) * weights / weights.sum())


def learned(config, stream):
    """Prediction per group of clicks, learned to the end."""
    rows, counts = stream.unique(dim=0, return_counts=True)
    logits = torch.zeros(len(RATES), 1, dtype=torch.float64, requires_grad=True)
    optimizer, loss = torch.optim.SGD([logits], lr=4.0), config.build()
    for _ in range(500):
        optimizer.zero_grad()
        loss(logits[rows[:, 0]], rows[:, 1:].double(), counts.unsqueeze(1).double()).sum().backward()
        optimizer.step()
    return logits.detach().sigmoid().flatten().tolist()


def test_the_true_rate_is_learned_from_a_stream_of_fake_negatives():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(len(RATES)).repeat_interleave(CLICKS)
    converts = torch.rand(len(groups), generator=generator) < torch.tensor(RATES)[groups]
    negatives = torch.stack([groups, torch.zeros_like(groups)], 1)
    positives = torch.stack([groups, torch.ones_like(groups)], 1)[converts]
    stream = torch.cat([negatives, positives])
    observed = [converts[groups == group].float().mean().item() for group in range(len(RATES))]
    assert observed == [pytest.approx(rate, abs=0.01) for rate in RATES]
    assert learned(FakeNegativeWeightedConfig(), stream) == [pytest.approx(rate, abs=1e-4) for rate in observed]
    assert learned(BinaryCrossEntropyConfig(), stream) == [pytest.approx(rate / (1 + rate), abs=1e-4) for rate in observed]
