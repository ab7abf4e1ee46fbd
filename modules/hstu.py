"""A sequence encoder without softmax, made for long histories."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlenv.errors import ConfigError, check_at_least
from mlenv.modules.embeddings import EmbeddedSequence
from mlenv.modules.mlp import check_dropout
from mlenv.modules.padding import Padding


@dataclass(frozen=True, kw_only=True)
class HSTUConfig:
    candidate: tuple[str, ...] = ()
    """Stays empty: the history is encoded by itself."""
    num_layers: int = 2
    """Encoder layers."""
    num_heads: int = 1
    """Attention heads."""
    head_dim: int = 32
    """Width of a head's queries, keys, values and gates."""
    max_length: int = 100
    """About the events of a full history: divides the attention, and events that lie further apart share one relative position."""
    dropout: float = 0.1
    """Share of gated activations that a training step hides."""

    def __post_init__(self) -> None:
        if self.candidate:
            fix = "leave it out, or choose an encoder that looks at the candidate: din, trans_act"
            raise ConfigError("candidate", expected="no features", received=self.candidate, fix=fix)
        for key in ("num_layers", "num_heads", "head_dim", "max_length"):
            check_at_least(key, getattr(self, key), 1)
        check_dropout("dropout", self.dropout)

    def build(self, event_dim: int, candidate_dim: int) -> HSTU:
        return HSTU(self, event_dim)


class HSTU(nn.Module):
    """Hierarchical sequential transduction units; the latest event speaks for the sequence.

    Linear maps run on the events alone; only attention is padded, to the longest sequence of the batch, and its memory grows
    with the square of that.

    Source: Zhai et al., "Actions Speak Louder than Words", ICML 2024, arXiv:2402.17152, section 3.
    """

    def __init__(self, config: HSTUConfig, event_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HSTULayer(config, event_dim) for _ in range(config.num_layers))
        self.output_dim = event_dim

    def forward(self, sequence: EmbeddedSequence, candidate: Tensor) -> Tensor:
        """
        Args:
            sequence: events of the batch, oldest first.
            candidate: not used.

        Returns:
            ``(batch, event_dim)``; an empty sequence is zeros.
        """
        padding, events = Padding(sequence), sequence.values
        for layer in self.layers:
            events = layer(events, padding)
        return padding.pad(events)[:, -1]


class HSTULayer(nn.Module):
    """One transduction unit, causal: an event looks at itself and at earlier ones.

    ``U, V, Q, K = split(silu(W1 norm(X)))``, ``A = silu(Q K^T + p) / n``, ``Y = X + W2 (norm(A V) * U)``

    ``p`` is one learned number per distance between two events, shared by the heads. Differs from the paper: the bias knows
    positions and no times; ``n`` is a constant, so that an example's output does not depend on the rest of its batch.

    Source: the same, section 3, equations 1 to 3; norm on the input and the residual as in the authors' code.
    """

    def __init__(self, config: HSTUConfig, event_dim: int) -> None:
        super().__init__()
        self.width = width = config.num_heads * config.head_dim
        self.num_heads, self.max_length = config.num_heads, config.max_length
        self.input_norm, self.attention_norm = nn.LayerNorm(event_dim), nn.LayerNorm(width)
        self.projection = nn.Linear(event_dim, 4 * width, bias=False)
        self.output = nn.Linear(width, event_dim)
        self.distance_bias = nn.Parameter(torch.randn(config.max_length) * 0.02)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, events: Tensor, padding: Padding) -> Tensor:
        """
        Args:
            events: ``(events, event_dim)``.
            padding: where they lie in the grid.

        Returns:
            ``(events, event_dim)``.
        """
        projected = functional.silu(self.projection(self.input_norm(events)))
        gates, attending = torch.split(projected, [self.width, 3 * self.width], dim=1)
        grid = padding.pad(attending).view(padding.batch_size, padding.longest, 3, self.num_heads, -1)
        values, queries, keys = grid.permute(2, 0, 3, 1, 4)
        distances = padding.ages - padding.ages.unsqueeze(1)
        bias = self.distance_bias[distances.clamp(0, self.max_length - 1)]
        scores = functional.silu(queries @ keys.transpose(2, 3) + bias) / self.max_length
        # Padding needs no mask of its own: its values are zeros.
        mixed = scores.tril() @ values
        attended = self.attention_norm(padding.unpad(mixed.transpose(1, 2).flatten(2)))
        outputs: Tensor = events + self.output(self.dropout(attended * gates))
        return outputs
