from __future__ import annotations

import pytest
import torch

from mlenv.loops.fit import Progress
from mlenv.loops.learning_rate import LearningRates, linear_decay, plateau_decay


def test_linear_decay_by_hand():
    schedule = linear_decay(total_steps=4)
    assert [schedule(0.8, Progress(step=step)) for step in range(6)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])


def test_plateau_decay_by_hand():
    rates = [plateau_decay(1e-3, Progress(decays=decays)) for decays in range(6)]
    assert rates == pytest.approx([1e-3, 1e-4, 1e-5, 1e-6, 1e-6, 1e-6])
    assert [plateau_decay(1e-7, Progress(decays=decays)) for decays in range(2)] == [1e-7, 1e-7]


def test_every_group_keeps_its_own_rate_and_a_fused_optimizer_is_told():
    class Fused(torch.optim.SGD):
        def step(self):
            told.append(self.param_groups[0]["lr"])

    told = []
    weights = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    adam = torch.optim.Adam([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:2], "lr": 0.2}])
    rates = LearningRates([adam], Fused(weights[2:], lr=0.5), plateau_decay)
    for decays in (1, 0, 1):  # from the start each time, not from the rate before
        rates.follow(Progress(decays=decays))
    assert [group["lr"] for group in adam.param_groups] == pytest.approx([0.01, 0.02])
    assert told == pytest.approx([0.05, 0.5, 0.05])
