from __future__ import annotations

import pytest
import torch

from mlenv.errors import ConfigError
from mlenv.modules.low_rank_cross_net import LowRankCrossNetConfig


@pytest.mark.parametrize("num_experts", [1, 3])
def test_equals_the_formula_expert_by_expert(num_experts):
    torch.manual_seed(0)
    rank = 2
    net = LowRankCrossNetConfig(num_layers=2, num_experts=num_experts, rank=rank).build((2, 3)).double()
    inputs = torch.randn(4, 5, dtype=torch.float64)
    expected = []
    for start in inputs:
        crossed = start
        for layer in net.layers:
            scores = torch.exp(layer.gate.weight @ crossed + layer.gate.bias)
            total = torch.zeros(5, dtype=torch.float64)
            for expert in range(num_experts):
                own = slice(expert * rank, (expert + 1) * rank)
                inner = torch.tanh(layer.inner[expert] @ torch.tanh(layer.reduce.weight[own] @ crossed))
                total += scores[expert] / scores.sum() * start * (layer.expand.weight[:, own] @ inner + layer.expand.bias)
            crossed = total + crossed
        expected.append(crossed)
    torch.testing.assert_close(net(inputs), torch.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("key", ["num_layers", "num_experts", "rank"])
def test_bad_values_are_refused(key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        LowRankCrossNetConfig(**{key: 0})
