"""What every loss of the table promises."""

from __future__ import annotations

import pytest
import torch

from mlenv.config import LOSSES
from mlenv.kinds import class_of
from mlenv.modules import (
    BinaryCrossEntropyConfig,
    FakeNegativeWeightedConfig,
    FocalLossConfig,
    GeneralizedCrossEntropyConfig,
    ListwiseLossConfig,
    PairwiseLossConfig,
    SymmetricCrossEntropyConfig,
    weighted_binary_cross_entropy,
)

POINTWISE = [
    BinaryCrossEntropyConfig(),
    BinaryCrossEntropyConfig(label_smoothing=0.1),
    FocalLossConfig(alpha=0.25),
    FocalLossConfig(gamma=0.5),
    GeneralizedCrossEntropyConfig(),
    SymmetricCrossEntropyConfig(),
    FakeNegativeWeightedConfig(),
]
WITHIN_REQUESTS = [
    PairwiseLossConfig(cross_entropy=0.5),
    PairwiseLossConfig(cross_entropy=0),
    ListwiseLossConfig(cross_entropy=0.5),
    ListwiseLossConfig(cross_entropy=0),
]
EVERY = pytest.mark.parametrize("config", [*POINTWISE, *WITHIN_REQUESTS], ids=str)


def examples(size=24, tasks=2, seed=0, soft=False):
    """Logits, labels, weights of which some are 0, and requests, in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, tasks, generator=generator, dtype=torch.float64)
    labels = torch.rand(size, tasks, generator=generator, dtype=torch.float64)
    weights = 3 * torch.rand(size, tasks, generator=generator, dtype=torch.float64)
    weights[torch.rand(size, tasks, generator=generator) < 0.3] = 0
    requests = torch.randint(-3, 4, (size,), generator=generator)
    return logits, labels if soft else labels.round(), weights, requests


def test_the_table_holds_every_loss():
    configs = {kind: class_of(kind, LOSSES, "losses") for kind in LOSSES}
    assert set(configs.values()) == {type(config) for config in (*POINTWISE, *WITHIN_REQUESTS)}
    assert {kind for kind, config in configs.items() if config.reads_requests} == {"pairwise", "listwise"}
    logits, labels, weights, requests = examples()
    plain = configs["binary_cross_entropy"]().build()(logits, labels, weights, requests)
    assert torch.equal(plain, weighted_binary_cross_entropy(logits, labels, weights))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("config", [config for config in (*POINTWISE, *WITHIN_REQUESTS) if config != FakeNegativeWeightedConfig()], ids=str)
def test_gradients(config, soft):
    logits, labels, weights, requests = examples(12, soft=soft)
    loss = config.build()
    assert torch.autograd.gradcheck(lambda inputs: loss(inputs, labels, weights, requests), logits.requires_grad_())


@EVERY
def test_the_order_of_rows_and_what_is_hidden_do_not_matter(config):
    logits, labels, weights, requests = examples()
    loss = config.build()
    expected = loss(logits, labels, weights, requests)
    assert (expected > 0).all()
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(logits[order], labels[order], weights[order], requests[order]), expected)
    hidden = weights == 0
    torch.testing.assert_close(loss(logits.masked_fill(hidden, 50), labels.masked_fill(hidden, 1), weights, requests), expected)
    first = loss(logits[:, :1], labels[:, :1], weights[:, :1], requests)
    torch.testing.assert_close(first, expected[:1])  # tasks know nothing of each other


@EVERY
def test_a_row_of_weight_two_counts_as_two_rows(config):
    logits, labels, weights, requests = examples()
    loss, rows = config.build(), torch.tensor([*range(24), 3, 4, 5])
    repeated = loss(logits[rows], labels[rows], weights[rows], requests[rows])
    weights[3:6] *= 2
    torch.testing.assert_close(loss(logits, labels, weights, requests), repeated)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(config, dtype):
    logits = torch.tensor([80.0, -80.0, 80.0, -80.0, 0.0, 80.0], dtype=dtype).unsqueeze(1).requires_grad_()
    labels = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.5]).unsqueeze(1)
    losses = config.build()(logits, labels, torch.ones(6, 1), torch.tensor([1, 1, 1, 1, 2, 2]))
    assert losses.isfinite().all()
    losses.sum().backward()
    assert logits.grad.isfinite().all()


@EVERY
def test_a_task_for_which_nothing_counts_has_no_loss_and_no_gradient(config):
    logits, labels, weights, requests = (part.float() if part.is_floating_point() else part for part in examples())
    logits.requires_grad_()
    weights[:, 1] = 0
    losses = config.build()(logits, labels, weights, requests)
    assert losses.shape == (2,)
    assert losses.dtype == torch.float32
    assert losses[1] == 0
    losses.sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[:, 1].any()


@EVERY
@pytest.mark.parametrize("size", [0, 1])
def test_an_empty_batch_and_a_batch_of_one(config, size):
    logits, labels, _, requests = examples(size)
    logits.requires_grad_()
    losses = config.build()(logits, labels, torch.ones_like(labels), requests)
    assert losses.shape == (2,)
    losses.sum().backward()
    if size == 0 or getattr(config, "cross_entropy", None) == 0:
        assert losses.tolist() == [0, 0]
        assert not logits.grad.any()
    else:
        assert (losses > 0).all()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("config", POINTWISE, ids=str)
def test_pointwise_losses_compile_and_export(config):
    loss, arguments = config.build(), examples()[:3]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), loss(*arguments))
    batch = torch.export.Dim("batch")
    exported = torch.export.export(loss, arguments, dynamic_shapes=({0: batch}, {0: batch}, {0: batch})).module()
    other = examples(7)[:3]
    torch.testing.assert_close(exported(*other), loss(*other))
