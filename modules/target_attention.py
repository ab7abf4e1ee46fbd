"""Attention from the candidate to the events of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlenv.errors import ConfigError, check_at_least
from mlenv.modules.embeddings import EmbeddedSequence, rows_of_bags
from mlenv.modules.mlp import MLPConfig


@dataclass(frozen=True, kw_only=True)
class TargetAttentionConfig:
    candidate: tuple[str, ...]
    """Features that describe what is being ranked; their vectors, side by side, ask the events how much they matter."""
    hidden: tuple[int, ...] = (64, 32)
    """Width of each hidden layer of the activation unit."""
    normalize: bool = False
    """Whether the weights of an example's events sum to 1; the paper leaves them free, so that a strong interest stays strong."""

    def __post_init__(self) -> None:
        check_candidate(self.candidate)
        for width in self.hidden:
            check_at_least("hidden", width, 1)

    def build(self, event_dim: int, candidate_dim: int) -> TargetAttention:
        return TargetAttention(self, event_dim, candidate_dim)


class TargetAttention(nn.Module):
    """Deep Interest Network: sums the events, each weighted by how much it says about the candidate.

    ``sum_j a(e_j, c) e_j`` with ``a(e, c) = MLP([e, c, e - c, e * c])``

    Differs from the paper: difference and elementwise product stand for the outer product; ReLU stands for Dice; a candidate
    of another width than the events is first mapped to theirs.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv:1706.06978, section 4.3.
    """

    def __init__(self, config: TargetAttentionConfig, event_dim: int, candidate_dim: int) -> None:
        super().__init__()
        self.candidate = nn.Identity() if candidate_dim == event_dim else nn.Linear(candidate_dim, event_dim)
        mlp = MLPConfig(hidden=config.hidden).build(4 * event_dim)
        self.activation_unit = nn.Sequential(mlp, nn.Linear(mlp.output_dim, 1))
        self.normalize, self.output_dim = config.normalize, event_dim

    def forward(self, sequence: EmbeddedSequence, candidate: Tensor) -> Tensor:
        """
        Args:
            sequence: events of the batch.
            candidate: ``(batch, candidate_dim)``.

        Returns:
            ``(batch, event_dim)``; an empty sequence is zeros.
        """
        events, batch_size = sequence.values, candidate.shape[0]
        rows = rows_of_bags(sequence.lengths, events.shape[0])
        asked = self.candidate(candidate).index_select(0, rows)
        weights = self.activation_unit(torch.cat([events, asked, events - asked, events * asked], dim=1))
        if self.normalize:
            weights = softmax_of_bags(weights.to(events.dtype), rows, batch_size)
        weighted: Tensor = weights * events
        return weighted.new_zeros(batch_size, self.output_dim).index_add(0, rows, weighted)


def softmax_of_bags(scores: Tensor, rows: Tensor, num_bags: int) -> Tensor:
    """Softmax of ``(events, 1)`` over the events of each example."""
    lowest = scores.new_full((num_bags, 1), -torch.inf)
    highest = lowest.scatter_reduce(
        0, rows.unsqueeze(1), scores.detach(), "amax"
    )  # keeps exp in range and cancels out, so it needs no gradient
    exponentials = (scores - highest.index_select(0, rows)).exp()
    totals = scores.new_zeros(num_bags, 1).index_add(0, rows, exponentials)
    return exponentials / totals.index_select(0, rows)


def check_candidate(candidate: tuple[str, ...]) -> None:
    """Raises ConfigError unless a feature is named."""
    if not candidate:
        fix = "name the features of what is ranked, for example [item_id]"
        raise ConfigError("candidate", expected="at least one feature", received=candidate, fix=fix)
