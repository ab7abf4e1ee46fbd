from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mlenv.errors import ConfigError
from mlenv.modules.masknet import MaskNetConfig

FIELD_DIMS = (3, 1, 3)


def made(**options):
    torch.manual_seed(0)
    model = MaskNetConfig(num_blocks=3, block_dim=4, token_dim=3, **options).build(FIELD_DIMS).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model, torch.randn(2, sum(FIELD_DIMS), dtype=torch.float64)


def block_of(block, fields, values):
    first, _, second = block.mask
    mask = second.weight @ (first.weight @ fields + first.bias).clamp(min=0) + second.bias
    linear, norm = block.hidden[0], block.hidden[1]
    return functional.layer_norm(linear.weight @ (mask * values), (4,), norm.weight, norm.bias).clamp(min=0)


def normalized(model, tokens):
    """Field by field."""
    parts = []
    for place, token in enumerate(tokens):
        centered = token - token.mean()
        parts.append(centered / (centered.square().mean() + 1e-5).sqrt() * model.scale[place] + model.shift[place])
    return torch.cat(parts)


@pytest.mark.parametrize("structure", ["serial", "parallel"])
def test_equals_block_by_block_and_field_by_field(structure):
    model, inputs = made(structure=structure)
    expected = []
    for tokens in model.tokens(inputs):
        fields, values = tokens.flatten(), normalized(model, tokens)
        if structure == "parallel":
            expected.append(torch.cat([block_of(block, fields, values) for block in model.blocks]))
            continue
        for block in model.blocks:
            values = block_of(block, fields, values)
        expected.append(values)
    torch.testing.assert_close(model(inputs), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert model.output_dim == (4 if structure == "serial" else 12)


def test_the_mask_is_wide_inside():
    model, _ = made(reduction_ratio=1.5)
    assert [block.mask[0].out_features for block in model.blocks] == [14, 6, 6]  # 1.5 * 9 and 1.5 * 4
    narrow, _ = made(reduction_ratio=0.01)
    assert [block.mask[0].out_features for block in narrow.blocks] == [1, 1, 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_blocks", 0), ("block_dim", 0), ("reduction_ratio", 0.0), ("token_dim", 1), ("dropout", -0.1)],
)
def test_bad_values_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        MaskNetConfig(**{key: value})
