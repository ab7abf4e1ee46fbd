"""A small network whose figures are worked out by hand."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from mlenv.batch import Batch, SparseFeatures
from mlenv.config import ObjectiveConfig
from mlenv.loops.step_statistics import step_statistics
from mlenv.modules import Objective


class Doubled(nn.Module):
    """Logits are twice the numbers; counts its batches as a batch normalization would."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        self.register_buffer("num_batches", torch.zeros(()))
        nn.init.constant_(self.linear.weight, 2.0)

    def forward(self, batch):
        self.num_batches += 1
        return self.linear(batch.dense)


def batch_of(*numbers):
    sparse = SparseFeatures((), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), ())
    rows = len(numbers)
    return Batch(sparse, torch.tensor(numbers).view(-1, 1), torch.zeros(rows, 1), torch.ones(rows, 1))


def statistics_of(model, *numbers):
    return step_statistics(model, Objective(ObjectiveConfig(), ["click"], model), batch_of(*numbers), nullcontext)


def test_figures_by_hand():
    model = Doubled()
    statistics = statistics_of(model, 0.0, 1.0)
    linear, whole = statistics.modules
    assert (linear.module, linear.kind, whole.module) == ("linear", "Linear", "model")
    assert (linear.activations.min, linear.activations.max, linear.activations.mean, linear.activations.non_finite) == (0, 2, 1, 0)
    # The gradient of the mean loss with respect to a logit is its probability / 2, with labels of 0.
    low, high = 0.5 / 2, float(torch.sigmoid(torch.tensor(2.0))) / 2
    assert (linear.gradients.min, linear.gradients.max) == pytest.approx((low, high))
    weight = statistics.parameters["linear.weight"]
    assert (weight.norm, weight.non_finite, weight.gradient_norm) == pytest.approx((2, 0, high))
    assert statistics.losses == {"click/loss": pytest.approx((0.693147 + 2.126928) / 2, rel=1e-5)}
    assert "the largest of size 2 from module 'linear'" in statistics.origin


def test_the_model_is_left_as_it_was():
    model = Doubled()
    before = torch.get_rng_state()
    statistics_of(model, 1.0)
    assert float(model.num_batches) == 0
    assert model.linear.weight.grad is None
    assert not model._forward_hooks
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_module_with_a_value_that_is_not_finite_is_named():
    statistics = statistics_of(Doubled(), 1.0, torch.inf)
    assert "come from module 'linear' (Linear)" in statistics.origin
    assert statistics.modules[0].activations.non_finite == 0.5
    assert statistics.modules[0].activations.max == 2
    broken = Doubled()
    nn.init.constant_(broken.linear.weight, torch.nan)
    statistics = statistics_of(broken, 1.0)
    assert "module 'linear' (Linear), whose parameter 'linear.weight' holds such values" in statistics.origin
    assert json.loads(statistics.to_json())["parameters"]["linear.weight"]["norm"] == "nan"
    assert "linear.weight" in str(statistics)
