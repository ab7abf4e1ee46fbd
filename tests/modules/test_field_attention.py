from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mlenv.errors import ConfigError
from mlenv.modules.field_attention import AutoIntConfig, FieldTransformerConfig

FIELD_DIMS = (4, 4, 1)


def some_inputs(field_dims=FIELD_DIMS):
    return torch.randn(3, sum(field_dims), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def attend(queries, keys, values, num_heads, scale):
    """One example, head by head and field by field."""
    num_fields, width = queries.shape
    rows = []
    for field in range(num_fields):
        parts = []
        for head in range(num_heads):
            own = slice(head * width // num_heads, (head + 1) * width // num_heads)
            weights = [torch.exp(scale * (queries[field, own] @ keys[other, own])) for other in range(num_fields)]
            parts.append(sum(weight / sum(weights) * values[other, own] for other, weight in enumerate(weights)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def norm(layer, tokens):
    return functional.layer_norm(tokens, tokens.shape[-1:], layer.weight, layer.bias)


@pytest.mark.parametrize("field_dims", [FIELD_DIMS, (4, 4, 4)])
def test_transformer_equals_a_loop_over_fields_and_heads(field_dims):
    torch.manual_seed(0)
    model = FieldTransformerConfig(token_dim=4, feed_forward_dim=5).build(field_dims).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.7)
    inputs = some_inputs(field_dims)
    expected = []
    for tokens in model.tokens(inputs) + model.field_embeddings:
        for layer in model.layers:
            queries, keys, values = layer.projection(norm(layer.attention_norm, tokens)).split(4, dim=1)
            tokens = tokens + layer.mixing(attend(queries, keys, values, 2, 2**-0.5))
            first, wide, _, narrow = layer.feed_forward
            tokens = tokens + narrow(functional.gelu(wide(norm(first, tokens))))
        expected.append(norm(model.norm, tokens).flatten())
    torch.testing.assert_close(model(inputs), torch.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_autoint_equals_a_loop_over_fields_and_heads(num_layers):
    torch.manual_seed(0)
    model = AutoIntConfig(token_dim=4, attention_dim=6, num_heads=3, num_layers=num_layers).build(FIELD_DIMS).double()
    inputs = some_inputs()
    expected = []
    for tokens in model.tokens(inputs):
        for layer in model.layers:
            queries, keys, values, residual = (tokens @ weight.T for weight in layer.weight.split(6))
            tokens = functional.relu(attend(queries, keys, values, 3, 1.0) + residual)
        expected.append(tokens.flatten())
    torch.testing.assert_close(model(inputs), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_dropout_hides_only_in_training():
    torch.manual_seed(0)
    model, inputs = FieldTransformerConfig(token_dim=4, dropout=0.5).build(FIELD_DIMS).double(), some_inputs()
    assert not torch.equal(model(inputs), model(inputs))
    assert torch.equal(model.eval()(inputs), model(inputs))


@pytest.mark.parametrize(
    ("config", "options", "key"),
    [
        (FieldTransformerConfig, {"token_dim": 10, "num_heads": 4}, "num_heads"),
        (FieldTransformerConfig, {"num_heads": 0}, "num_heads"),
        (FieldTransformerConfig, {"token_dim": 0}, "token_dim"),
        (FieldTransformerConfig, {"num_layers": 0}, "num_layers"),
        (FieldTransformerConfig, {"feed_forward_dim": 0}, "feed_forward_dim"),
        (FieldTransformerConfig, {"dropout": 1.0}, "dropout"),
        (AutoIntConfig, {"attention_dim": 10, "num_heads": 4}, "num_heads"),
        (AutoIntConfig, {"num_heads": 0}, "num_heads"),
        (AutoIntConfig, {"token_dim": 0}, "token_dim"),
        (AutoIntConfig, {"num_layers": 0}, "num_layers"),
        (AutoIntConfig, {"attention_dim": 0}, "attention_dim"),
    ],
)
def test_bad_values_are_refused(config, options, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        config(**options)


def test_refused_heads_come_with_the_fix():
    with pytest.raises(ConfigError) as refused:
        FieldTransformerConfig(token_dim=10, num_heads=4)
    assert str(refused.value) == "num_heads: expected a divisor of token_dim = 10. Received: 4. Fix: change it or token_dim."
