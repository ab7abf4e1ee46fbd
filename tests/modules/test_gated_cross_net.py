from __future__ import annotations

import pytest
import torch

from mlenv.errors import ConfigError
from mlenv.modules.gated_cross_net import GatedCrossNetConfig


def test_equals_the_formula_row_by_row():
    torch.manual_seed(0)
    net = GatedCrossNetConfig(num_layers=3).build((2, 3)).double()
    inputs = torch.randn(4, 5, dtype=torch.float64)
    expected = []
    for start in inputs:
        crossed = start
        for cross, gate in zip(net.crosses, net.gates, strict=True):
            weights = 1 / (1 + torch.exp(-(gate.weight @ crossed)))
            crossed = start * (cross.weight @ crossed + cross.bias) * weights + crossed
        expected.append(crossed)
    torch.testing.assert_close(net(inputs), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_bad_values_are_refused():
    with pytest.raises(ConfigError, match=r"^num_layers: "):
        GatedCrossNetConfig(num_layers=0)
