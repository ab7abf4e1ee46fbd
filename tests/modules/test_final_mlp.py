from __future__ import annotations

import pytest
import torch

from mlenv.errors import ConfigError
from mlenv.modules.final_mlp import FinalMLPConfig
from mlenv.modules.mlp import MLPConfig


@pytest.mark.parametrize(("num_heads", "fused_dim"), [(1, 1), (2, 3)])
def test_equals_the_formula_row_by_row_and_head_by_head(num_heads, fused_dim):
    torch.manual_seed(0)
    streams = {"first": MLPConfig(hidden=(7, 4)), "second": MLPConfig(hidden=(6,))}
    model = FinalMLPConfig(gate=MLPConfig(hidden=(3,)), num_heads=num_heads, fused_dim=fused_dim, **streams).build((2, 3)).double()
    inputs = torch.randn(4, 5, dtype=torch.float64)
    expected = []
    for row in inputs:
        outputs = []
        for gate, stream in zip(model.gates, model.streams, strict=True):
            weights = 2 / (1 + torch.exp(-gate(row)))
            outputs.append(stream(weights * row))
        first, second = outputs
        fused = model.linear.weight[:, :4] @ first + model.linear.weight[:, 4:] @ second + model.linear.bias
        for head, weight in enumerate(model.bilinear.view(num_heads, 4 // num_heads, 6 // num_heads, fused_dim)):
            one, two = first.chunk(num_heads)[head], second.chunk(num_heads)[head]
            fused = fused + torch.stack([one @ weight[:, :, place] @ two for place in range(fused_dim)])
        expected.append(fused)
    torch.testing.assert_close(model(inputs), torch.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"fused_dim": 0}, "fused_dim"),
        ({"num_heads": 3}, "num_heads"),
        ({"num_heads": 5, "second": MLPConfig(hidden=(10,)), "first": MLPConfig(hidden=(12,))}, "num_heads"),
        ({"first": MLPConfig(hidden=())}, r"first\.hidden"),
        ({"second": MLPConfig(hidden=())}, r"second\.hidden"),
    ],
)
def test_bad_values_are_refused(options, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        FinalMLPConfig(**options)
