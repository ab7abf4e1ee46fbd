"""The plainest summary of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlenv.modules.embeddings import EmbeddedSequence, rows_of_bags


@dataclass(frozen=True, kw_only=True)
class MeanPoolingConfig:
    candidate: tuple[str, ...] = ()
    """Stays empty: a mean does not look at the candidate."""

    def build(self, event_dim: int, candidate_dim: int) -> MeanPooling:
        return MeanPooling(event_dim)


class MeanPooling(nn.Module):
    """The mean of the events, and log(1 + number of events).

    A mean does not tell one event from many, and how much somebody did is a feature of its own.
    """

    def __init__(self, event_dim: int) -> None:
        super().__init__()
        self.output_dim = event_dim + 1

    def forward(self, sequence: EmbeddedSequence, candidate: Tensor) -> Tensor:
        """
        Args:
            sequence: events of the batch.
            candidate: not used.

        Returns:
            ``(batch, event_dim + 1)``; an empty sequence is zeros.
        """
        values, lengths = sequence.values, sequence.lengths
        total = values.new_zeros(lengths.shape[0], values.shape[1]).index_add(0, rows_of_bags(lengths, values.shape[0]), values)
        counts = lengths.to(values.dtype).unsqueeze(1)
        return torch.cat([total / counts.clamp(min=1), counts.log1p()], dim=1)
