from __future__ import annotations

import math

import pytest
import torch

from mlenv.config import LoopConfig
from mlenv.errors import ConfigError
from mlenv.loops.fit import Progress
from mlenv.loops.learning_rate import LearningRates, cosine_decay, linear_decay, plateau_decay, schedule_of


def test_linear_decay_by_hand():
    schedule = linear_decay(total_steps=4)
    assert [schedule(0.8, Progress(step=step)) for step in range(6)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])


def test_cosine_decay_by_hand():
    schedule = cosine_decay(total_steps=4)
    expected = [0.8, 0.4 * (1 + math.sqrt(0.5)), 0.4, 0.4 * (1 - math.sqrt(0.5)), 0, 0]
    assert [schedule(0.8, Progress(step=step)) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.2, 0.4, 0.6, 0.8, 0.6, 0.4, 0.2, 0]),
        ("cosine", [0.2, 0.4, 0.6, 0.8, 0.4 * (1 + math.sqrt(0.5)), 0.4, 0.4 * (1 - math.sqrt(0.5)), 0]),
        ("plateau", [0.02, 0.04, 0.06, 0.08, 0.08, 0.08, 0.08, 0.08]),
    ],
)
def test_each_decay_begins_when_the_warm_up_ends(decay, expected):
    schedule = schedule_of(LoopConfig(warmup_steps=3, warmup_start=0.25, learning_rate_decay=decay), total_steps=7)
    decays = 1 if decay == "plateau" else 0
    assert [schedule(0.8, Progress(step=step, decays=decays)) for step in range(8)] == pytest.approx(expected)


def test_a_warm_up_without_end_is_refused_and_nothing_to_follow_is_none():
    with pytest.raises(ConfigError, match=r"loop\.warmup_steps: expected fewer than the 7 steps of the training"):
        schedule_of(LoopConfig(warmup_steps=7), total_steps=7)
    assert schedule_of(LoopConfig(), total_steps=7) is None
    assert schedule_of(LoopConfig(), total_steps=0) is None


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
