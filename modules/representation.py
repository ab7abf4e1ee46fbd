"""All features of an example as one vector."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from mlenv.batch import Batch
from mlenv.errors import ConfigError, nearest, placed_under
from mlenv.modules.embeddings import Embeddings
from mlenv.modules.mean_pooling import MeanPoolingConfig
from mlenv.modules.normalization import NumericNormalization
from mlenv.schema import Schema


class SequenceConfig(Protocol):
    """Builds a module ``(EmbeddedSequence, candidate) -> (batch, output_dim)`` with an attribute ``output_dim``.

    ``candidate`` is ``(batch, candidate_dim)``: the vectors of the features that the config names, side by side.
    """

    @property
    def candidate(self) -> tuple[str, ...]: ...

    def build(self, event_dim: int, candidate_dim: int) -> nn.Module: ...


SEQUENCES: dict[str, type | str] = {
    "din": "mlenv.modules.target_attention:TargetAttentionConfig",
    "hstu": "mlenv.modules.hstu:HSTUConfig",
    "mean": MeanPoolingConfig,
    "trans_act": "mlenv.modules.trans_act:TransActConfig",
}
"""Encoders of a sequence by the name that ``model.sequences.FEATURE.kind`` takes."""


class Representation(nn.Module):
    """Embedded ids, encoded sequences and normalized numbers, side by side.

    Args:
        sequences: encoder of each sequence feature; one that is not named is averaged.

    Raises:
        ConfigError: an encoder is given for what is no sequence, or its candidate is no embedded feature.
    """

    def __init__(self, schema: Schema, embeddings: Embeddings, sequences: Mapping[str, SequenceConfig] | None = None) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.normalization = NumericNormalization(schema)
        layout = embeddings.layout
        ends = list(accumulate(layout.pooled_dims))
        self._columns = {
            key.name: slice(end - dim, end) for key, dim, end in zip(layout.pooled_keys, layout.pooled_dims, ends, strict=True)
        }
        configs = dict(sequences or {})
        for name in configs.keys() - layout.sequence_dims.keys():
            raise ConfigError(f"sequences.{name}", expected="a sequence feature", received=name, fix=nearest(name, layout.sequence_dims))
        self.encoders = nn.ModuleDict()
        self._candidates: dict[str, tuple[str, ...]] = {}
        for name, event_dim in layout.sequence_dims.items():
            config = configs.get(name, MeanPoolingConfig())
            for feature in (feature for feature in config.candidate if feature not in self._columns):
                key, fix = f"sequences.{name}.candidate", nearest(feature, self._columns)
                raise ConfigError(key, expected="features with an embedding table", received=feature, fix=fix)
            self._candidates[name] = config.candidate
            candidate_dim = sum(self._columns[feature].stop - self._columns[feature].start for feature in config.candidate)
            with placed_under(f"sequences.{name}"):
                self.encoders[name] = config.build(event_dim, candidate_dim)
        encoded_dims = [int(encoder.output_dim) for encoder in self.encoders.values()]  # type: ignore[arg-type]
        self.field_dims = (*layout.pooled_dims, *encoded_dims, *(column.width for column in schema.dense_columns))
        """Width of each field of the output: ids, sequences, numbers."""
        self.output_dim = sum(self.field_dims)

    def forward(self, batch: Batch) -> Tensor:
        """
        Returns:
            ``(batch, output_dim)`` float32.
        """
        if not self.embeddings.layout.keys:
            normalized: Tensor = self.normalization(batch.dense)
            return normalized
        embedded = self.embeddings(batch.sparse)
        encoded = []
        for name, encoder in self.encoders.items():
            candidate = [embedded.pooled[:, self._columns[feature]] for feature in self._candidates[name]]
            encoded.append(encoder(embedded.sequences[name], torch.cat(candidate, dim=1) if candidate else embedded.pooled[:, :0]))
        return torch.cat([embedded.pooled, *encoded, self.normalization(batch.dense)], dim=1)
