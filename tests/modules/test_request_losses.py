from __future__ import annotations

import itertools
import math

import pytest
import torch

from mlenv.errors import ConfigError
from mlenv.modules import ListwiseLossConfig, PairwiseLossConfig, weighted_binary_cross_entropy

SHOWN = (0.4, 0.1)
"""How often the first and the second row of a request is clicked, independently."""


def slow_pairwise(logits, labels, weights, requests):
    """One task, pair by pair."""
    rows = range(len(logits))
    loss = total = 0.0
    for i, j in itertools.product(rows, rows):
        if i != j and requests[i] == requests[j]:
            weight = weights[i] * labels[i] * weights[j] * (1 - labels[j])
            loss += weight * math.log1p(math.exp(logits[j] - logits[i]))
            total += weight
    return loss / total


def slow_listwise(logits, labels, weights, requests):
    """One task, request by request."""
    loss = total = 0.0
    for request in set(requests):
        rows = [row for row in range(len(logits)) if requests[row] == request]
        positive = sum(weights[row] * labels[row] for row in rows)
        if positive > 0 and sum(weights[row] * (1 - labels[row]) for row in rows) > 0:
            partition = math.log(sum(weights[row] * math.exp(logits[row]) for row in rows))
            loss += sum(weights[row] * labels[row] * (partition - logits[row]) for row in rows)
            total += positive
    return loss / total


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("config", "slow"), [(PairwiseLossConfig, slow_pairwise), (ListwiseLossConfig, slow_listwise)])
def test_equal_to_slow_loops(config, slow, soft):
    generator = torch.Generator().manual_seed(0)
    logits, labels, weights = torch.rand(3, 40, 3, generator=generator, dtype=torch.float64)
    logits, labels = 8 * logits - 4, labels if soft else labels.round()
    weights = weights.masked_fill(weights < 0.3, 0)
    requests = torch.randint(-3, 4, (40,), generator=generator)
    columns = [[part[:, task].tolist() for part in (logits, labels, weights)] for task in range(3)]
    expected = torch.tensor([slow(*column, requests.tolist()) for column in columns], dtype=torch.float64)
    torch.testing.assert_close(config(cross_entropy=0).build()(logits, labels, weights, requests), expected)
    beside = expected + 0.5 * weighted_binary_cross_entropy(logits, labels, weights)
    torch.testing.assert_close(config(cross_entropy=0.5).build()(logits, labels, weights, requests), beside)


def column(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def test_values_by_hand():
    logits, labels, requests = column(1.0, 0.0, 2.0, 5.0, 7.0), column(1, 0, 0, 1, 0), torch.tensor([7, 7, 7, 8, -1])
    ones = torch.ones_like(logits)
    pairs = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2
    assert PairwiseLossConfig(cross_entropy=0).build()(logits, labels, ones, requests).item() == pytest.approx(pairs)
    softmax = math.log(math.exp(1) + 1 + math.exp(2)) - 1  # request 8 has no negative and does not count
    assert ListwiseLossConfig(cross_entropy=0).build()(logits, labels, ones, requests).item() == pytest.approx(softmax)


@pytest.mark.parametrize("config", [PairwiseLossConfig, ListwiseLossConfig])
@pytest.mark.parametrize(
    ("labels", "weights", "requests"),
    [
        ([1, 0, 1, 0], [1, 1, 1, 1], [1, 2, 3, 4]),  # every row is a request
        ([1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 2, 2]),  # one class in each request
        ([1, 0, 1, 0], [1, 0, 0, 1], [1, 1, 2, 2]),  # the other class is hidden
        ([1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]),
    ],
)
def test_without_anything_to_compare_only_the_cross_entropy_is_left(config, labels, weights, requests):
    logits = column(0.3, -80.0, 80.0, 0.1).requires_grad_()
    arguments = (logits, column(*labels), column(*weights), torch.tensor(requests))
    ranking = config(cross_entropy=0).build()(*arguments)
    assert ranking.item() == 0
    ranking.sum().backward()
    assert not logits.grad.any()
    assert torch.equal(config().build()(*arguments), weighted_binary_cross_entropy(*arguments[:3]))


@pytest.mark.parametrize("config", [PairwiseLossConfig, ListwiseLossConfig])
def test_the_cross_entropy_keeps_the_level(config):
    first, second = SHOWN
    shares = {(1, 1): first * second, (1, 0): first * (1 - second), (0, 1): (1 - first) * second, (0, 0): (1 - first) * (1 - second)}
    labels = column(*(label for pair, share in shares.items() for _ in range(round(100 * share)) for label in pair))
    requests, learned = torch.arange(100).repeat_interleave(2), {}
    for weight in (0.0, 1.0):
        logits = torch.full((2, 1), 3.0, dtype=torch.float64, requires_grad=True)
        optimizer, loss = torch.optim.SGD([logits], lr=2.0), config(cross_entropy=weight).build()
        for _ in range(300):
            optimizer.zero_grad()
            loss(logits.repeat(100, 1), labels, torch.ones_like(labels), requests).sum().backward()
            optimizer.step()
        learned[weight] = logits.detach().flatten()
    truth = torch.tensor(SHOWN, dtype=torch.float64).logit()
    torch.testing.assert_close(learned[1.0], truth, atol=1e-3, rtol=0)
    torch.testing.assert_close(learned[0.0].diff(), truth.diff(), atol=1e-3, rtol=0)
    assert learned[0.0].mean().item() == pytest.approx(3)  # the order alone leaves the level where it was


@pytest.mark.parametrize("config", [PairwiseLossConfig, ListwiseLossConfig])
def test_requests_must_be_there(config):
    with pytest.raises(ConfigError, match="the extra 'requests'"):
        config().build()(column(0.0), column(1), column(1), None)
    with pytest.raises(ConfigError, match="cross_entropy"):
        config(cross_entropy=-1.0)
