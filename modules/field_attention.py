"""Self-attention between the fields of an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlenv.errors import ConfigError, check_at_least
from mlenv.modules.crossings import check_several_fields
from mlenv.modules.field_tokens import FieldTokens
from mlenv.modules.mlp import check_dropout


@dataclass(frozen=True, kw_only=True)
class FieldTransformerConfig:
    token_dim: int = 16
    """Width that every field is brought to and keeps through the layers."""
    num_layers: int = 2
    """Encoder layers."""
    num_heads: int = 2
    """Attention patterns per layer; a divisor of token_dim."""
    feed_forward_dim: int = 64
    """Hidden width of the network behind each attention."""
    dropout: float = 0.0
    """Share of what an attention or a feed-forward network adds that a training step hides."""

    def __post_init__(self) -> None:
        check_at_least("token_dim", self.token_dim, 1)
        check_at_least("num_layers", self.num_layers, 1)
        _check_heads(self.num_heads, "token_dim", self.token_dim)
        check_at_least("feed_forward_dim", self.feed_forward_dim, 1)
        check_dropout("dropout", self.dropout)

    def build(self, field_dims: Sequence[int]) -> FieldTransformer:
        check_several_fields("transformer", field_dims)
        return FieldTransformer(self, field_dims)


class FieldTransformer(nn.Module):
    """A transformer encoder over the fields of an example, each of which is a token.

    With ``X`` the tokens plus a learned embedding of their field, every layer does
    ``X = X + W_o attention(norm(X))`` and then ``X = X + feed_forward(norm(X))``; the output is ``norm(X)``, flattened.

    Source: Huang et al., "TabTransformer", arXiv:2012.06678, section 2 (columns as tokens, their outputs concatenated).
    Norms stand before the layers, not after them: Xiong et al., "On Layer Normalization in the Transformer Architecture",
    ICML 2020, arXiv:2002.04745. Here numbers are tokens too, and a field's embedding is added to its token rather than put beside it.
    """

    def __init__(self, config: FieldTransformerConfig, field_dims: Sequence[int]) -> None:
        super().__init__()
        self.tokens = FieldTokens(field_dims, config.token_dim)
        # From zero: rows of embedding tables start small, and a random field embedding would drown them.
        self.field_embeddings = nn.Parameter(torch.zeros(len(field_dims), config.token_dim))
        self.layers = nn.Sequential(*(_EncoderLayer(config) for _ in range(config.num_layers)))
        self.norm = nn.LayerNorm(config.token_dim)
        self.output_dim = len(field_dims) * config.token_dim

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, sum of field_dims)``, float32 or bfloat16.

        Returns:
            ``(batch, fields * token_dim)``.
        """
        tokens = self.layers(self.tokens(inputs) + self.field_embeddings)
        outputs: Tensor = self.norm(tokens).flatten(1)
        return outputs


class _EncoderLayer(nn.Module):
    def __init__(self, config: FieldTransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(config.token_dim)
        self.projection = nn.Linear(config.token_dim, 3 * config.token_dim)
        self.mixing = nn.Linear(config.token_dim, config.token_dim)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(config.token_dim),
            nn.Linear(config.token_dim, config.feed_forward_dim),
            nn.GELU(),
            nn.Linear(config.feed_forward_dim, config.token_dim),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        queries, keys, values = self.projection(self.attention_norm(tokens)).chunk(3, dim=2)
        attended = _attention(queries, keys, values, self.num_heads, scale=None)
        tokens = tokens + self.dropout(self.mixing(attended))
        outputs: Tensor = tokens + self.dropout(self.feed_forward(tokens))
        return outputs


@dataclass(frozen=True, kw_only=True)
class AutoIntConfig:
    token_dim: int = 16
    """Width that every field is brought to before the first layer."""
    num_layers: int = 3
    """Interacting layers; each lets a field combine with the combinations of the layer before."""
    attention_dim: int = 64
    """Width of a field behind each layer, over all heads together."""
    num_heads: int = 2
    """Attention patterns per layer; a divisor of attention_dim."""

    def __post_init__(self) -> None:
        check_at_least("token_dim", self.token_dim, 1)
        check_at_least("num_layers", self.num_layers, 1)
        check_at_least("attention_dim", self.attention_dim, 1)
        _check_heads(self.num_heads, "attention_dim", self.attention_dim)

    def build(self, field_dims: Sequence[int]) -> AutoInt:
        check_several_fields("autoint", field_dims)
        return AutoInt(self, field_dims)


class AutoInt(nn.Module):
    """Combines each field with the fields that it attends to, a number of times.

    A layer gives field ``m`` the value ``relu(concat over heads of sum_k a[m, k] W_v e[k]  +  W_r e[m])`` where
    ``a[m, :] = softmax over k of <W_q e[m], W_k e[k]>``, not divided by the root of the width. The fields are flattened.

    Source: Song et al., "AutoInt", CIKM 2019, arXiv:1810.11921, sections 4.4 and 4.5. Beside the ranker's deep network
    it is the paper's AutoInt+.
    """

    def __init__(self, config: AutoIntConfig, field_dims: Sequence[int]) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.tokens = FieldTokens(field_dims, config.token_dim)
        widths = [config.token_dim] + [config.attention_dim] * (config.num_layers - 1)
        # W_q, W_k, W_v and W_r of a layer, one over the other.
        self.layers = nn.ModuleList(nn.Linear(width, 4 * config.attention_dim, bias=False) for width in widths)
        self.output_dim = len(field_dims) * config.attention_dim

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, sum of field_dims)``, float32 or bfloat16.

        Returns:
            ``(batch, fields * attention_dim)``, >= 0.
        """
        tokens: Tensor = self.tokens(inputs)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            # Four products, not one cut in four, whose gradient would first be put together: a sixth faster on a CPU.
            queries, keys, values, residual = (functional.linear(tokens, weight) for weight in layer.weight.chunk(4))
            tokens = functional.relu(_attention(queries, keys, values, self.num_heads, scale=1.0) + residual)
        return tokens.flatten(1)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, num_heads: int, scale: float | None) -> Tensor:
    """Multi-head attention between fields; all of it is ``(batch, fields, width)``."""
    heads = [torch.unflatten(tensor, 2, (num_heads, -1)).transpose(1, 2) for tensor in (queries, keys, values)]
    attended = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], scale=scale)
    return attended.transpose(1, 2).flatten(2)


def _check_heads(num_heads: int, name: str, width: int) -> None:
    check_at_least("num_heads", num_heads, 1)
    if width % num_heads:
        raise ConfigError("num_heads", expected=f"a divisor of {name} = {width}", received=num_heads, fix=f"change it or {name}")
