"""All features of an example as one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlenv.batch import Batch
from mlenv.modules.embeddings import EmbeddedSequence, Embeddings, rows_of_bags
from mlenv.modules.normalization import NumericNormalization
from mlenv.schema import Schema


class Representation(nn.Module):
    """Embedded ids, the mean of every sequence and how long it is, and normalized numbers, side by side."""

    def __init__(self, schema: Schema, embeddings: Embeddings) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.normalization = NumericNormalization(schema)
        layout = embeddings.layout
        self.output_dim = sum(layout.pooled_dims) + sum(dim + 1 for dim in layout.sequence_dims.values()) + schema.num_dense

    def forward(self, batch: Batch) -> Tensor:
        """
        Returns:
            ``(batch, output_dim)`` float32; an empty sequence is zeros.
        """
        embedded = self.embeddings(batch.sparse)
        sequences = list(embedded.sequences.values())
        means = [mean_of_events(sequence) for sequence in sequences]
        # A mean does not tell one event from many, and how much somebody did is a feature of its own.
        sizes = [sequence.lengths.float().log1p().unsqueeze(1) for sequence in sequences]
        return torch.cat([embedded.pooled, *means, *sizes, self.normalization(batch.dense)], dim=1)


def mean_of_events(sequence: EmbeddedSequence) -> Tensor:
    """Averages the events of every example: ``(batch, dim)``; an empty sequence is zeros."""
    values, lengths = sequence.values, sequence.lengths
    total = values.new_zeros(len(lengths), values.shape[1]).index_add(0, rows_of_bags(lengths, len(values)), values)
    return total / lengths.clamp(min=1).unsqueeze(1)
