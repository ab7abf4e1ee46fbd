"""A transformer over the events, each beside the candidate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlenv.errors import ConfigError, check_at_least
from mlenv.modules.embeddings import EmbeddedSequence
from mlenv.modules.mlp import check_dropout
from mlenv.modules.padding import Padding
from mlenv.modules.target_attention import check_candidate


@dataclass(frozen=True, kw_only=True)
class TransActConfig:
    candidate: tuple[str, ...]
    """Features that describe what is being ranked; their vectors, side by side, are joined to every event."""
    num_layers: int = 2
    """Encoder layers."""
    num_heads: int = 1
    """Attention heads; they divide the width of an event and the candidate together."""
    feed_forward_dim: int = 32
    """Hidden width of each layer's feed-forward network."""
    num_last: int = 10
    """How many of the latest events the output keeps one by one."""
    max_hidden_events: int = 0
    """A training step hides the latest 0 to this many events of each example, drawn evenly; 0 hides none."""
    dropout: float = 0.1
    """Share of activations that a training step hides, after attention and in the feed-forward network."""

    def __post_init__(self) -> None:
        check_candidate(self.candidate)
        for key in ("num_layers", "num_heads", "feed_forward_dim"):
            check_at_least(key, getattr(self, key), 1)
        for key in ("num_last", "max_hidden_events"):
            check_at_least(key, getattr(self, key), 0)
        check_dropout("dropout", self.dropout)

    def build(self, event_dim: int, candidate_dim: int) -> TransAct:
        token_dim = event_dim + candidate_dim
        if token_dim % self.num_heads:
            expected = f"a divisor of {token_dim}, the width of an event ({event_dim}) and the candidate ({candidate_dim}) together"
            raise ConfigError("num_heads", expected=expected, received=self.num_heads)
        return TransAct(self, token_dim)


class TransAct(nn.Module):
    """Encodes what an event means for the candidate in the light of the other events.

    ``t = encoder([e_j, c])``, output ``[t_(n-k+1), ..., t_n, max_j t_j]`` with k = ``num_last``

    The latest events are hidden at random while training, so that the model does not lean on the last minutes alone.
    Differs from the paper: that window counts events and is drawn per example, because a sequence carries no clock; hidden
    and missing events are zeros in the output.
    Linear maps run on the events alone; only attention is padded, to the longest sequence of the batch.

    Source: Xia et al., "TransAct: Transformer-based Realtime User Action Model for Recommendation at Pinterest", KDD 2023,
    arXiv:2306.00248, section 3.
    """

    def __init__(self, config: TransActConfig, token_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, token_dim) for _ in range(config.num_layers))
        self.num_last, self.max_hidden_events = config.num_last, config.max_hidden_events
        self.output_dim = (config.num_last + 1) * token_dim

    def forward(self, sequence: EmbeddedSequence, candidate: Tensor) -> Tensor:
        """
        Args:
            sequence: events of the batch, oldest first.
            candidate: ``(batch, candidate_dim)``.

        Returns:
            ``(batch, output_dim)``: the ``num_last`` latest tokens, oldest first, then the maximum; an empty sequence is zeros.
        """
        padding = Padding(sequence)
        visible = padding.is_event
        if self.training and self.max_hidden_events:
            num_hidden = torch.randint(self.max_hidden_events + 1, (candidate.shape[0], 1), device=candidate.device)
            visible = visible & (padding.ages >= num_hidden)
        tokens = torch.cat([sequence.values, candidate.index_select(0, padding.rows)], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, padding, visible)
        return self._summary(padding.pad(tokens), visible)

    def _summary(self, tokens: Tensor, visible: Tensor) -> Tensor:
        hidden = ~visible.unsqueeze(2)
        highest = tokens.masked_fill(hidden, -torch.inf).amax(1).masked_fill(hidden.all(1), 0)
        latest = functional.pad(tokens.masked_fill(hidden, 0), (0, 0, self.num_last, 0))  # a batch may hold fewer events than asked for
        return torch.cat([latest[:, latest.shape[1] - self.num_last :].flatten(1), highest], dim=1)


class EncoderLayer(nn.Module):
    """A transformer encoder layer, normalized after each part, without positions.

    ``x = norm(x + attention(x))``, ``x = norm(x + W2 relu(W1 x))``

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv:1706.03762, section 3.1.
    """

    def __init__(self, config: TransActConfig, token_dim: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.queries_keys_values = nn.Linear(token_dim, 3 * token_dim)
        self.attended = nn.Linear(token_dim, token_dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(token_dim, config.feed_forward_dim),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.feed_forward_dim, token_dim),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(token_dim) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, padding: Padding, visible: Tensor) -> Tensor:
        """
        Args:
            tokens: ``(events, token_dim)``.
            padding: where they lie in the grid.
            visible: ``(batch, longest)`` bool, the events that others may look at.

        Returns:
            ``(events, token_dim)``.
        """
        grid = padding.pad(self.queries_keys_values(tokens)).view(padding.batch_size, padding.longest, 3, self.num_heads, -1)
        queries, keys, values = grid.permute(2, 0, 3, 1, 4)
        # Where nothing is visible all of the padding is, because a softmax over nothing has no value.
        mask = visible | ~visible.any(1, keepdim=True)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None, :])
        attended = self.attended(padding.unpad(mixed.transpose(1, 2).flatten(2)))
        tokens = self.norms[0](tokens + self.dropout(attended))
        outputs: Tensor = self.norms[1](tokens + self.dropout(self.feed_forward(tokens)))
        return outputs
