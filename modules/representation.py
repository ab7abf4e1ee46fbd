"""All features of an example as one vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlenv.batch import Batch, SparseFeatures
from mlenv.errors import ConfigError, nearest, placed_under
from mlenv.modules.embeddings import Embeddings
from mlenv.modules.feature_dropout import FeatureDropoutConfig
from mlenv.modules.field_nulls import FieldNulls
from mlenv.modules.mean_pooling import MeanPoolingConfig
from mlenv.modules.normalization import NumericNormalizationConfig
from mlenv.schema import Binary, Feature, Numeric, Schema


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


class NumbersConfig(Protocol):
    """Builds a module ``(batch, num_dense) -> (batch, num_dense)`` from raw values to finite ones; NaN, a null, to those of the mean."""

    def build(self, schema: Schema) -> nn.Module: ...


NUMBERS: dict[str, type | str] = {
    "mixed": "mlenv.modules.mixed_numbers:MixedNumbersConfig",
    "standardized": NumericNormalizationConfig,
}
"""Ways to bring numbers to one scale by the name that ``model.numbers.kind`` takes."""


class Representation(nn.Module):
    """Embedded ids, encoded sequences and normalized numbers, side by side.

    A missing number without a default is its mean plus a learned number, zero at the start. With feature dropout an empty
    bag or sequence is a learned vector, zeros at the start, and what a training step hides looks as it would to a server
    that misses it: a learned null where there is one, the default of a number or a flag, zeros for a vector. What a
    sequence's candidate consists of is hidden with its features.

    Args:
        sequences: encoder of each sequence feature; one that is not named is averaged.
        numbers: how numbers come to one scale.
        feature_dropout: which features training steps hide.

    Raises:
        ConfigError: an encoder is given for what is no sequence, its candidate is no embedded feature, or a feature to
            hide is not there or cannot be.
    """

    dense_fields: Tensor
    first_keys: Tensor
    stand_ins: Tensor

    def __init__(
        self,
        schema: Schema,
        embeddings: Embeddings,
        sequences: Mapping[str, SequenceConfig] | None = None,
        numbers: NumbersConfig | None = None,
        feature_dropout: FeatureDropoutConfig | None = None,
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.normalization = (numbers or NumericNormalizationConfig()).build(schema)
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
        self.features = (
            *(key.name for key in layout.pooled_keys),
            *layout.sequence_dims,
            *(column.name for column in schema.dense_columns),
        )
        """Feature of each field."""
        self.output_dim = sum(self.field_dims)
        stand_ins = [_stand_in(schema.features[column.name]) for column in schema.dense_columns for _ in range(column.width)]
        self.number_nulls = nn.Parameter(torch.zeros(schema.num_dense)) if any(map(math.isnan, stand_ins)) else None
        self.feature_dropout = None
        if feature_dropout is not None:
            with placed_under("feature_dropout"):
                self.feature_dropout = feature_dropout.build(schema, self.features)
            self.pooled_nulls, self.sequence_nulls = FieldNulls(layout.pooled_dims), FieldNulls(encoded_dims)
            of_features = [key.feature for key in layout.keys]
            first_keys = [of_features.index(feature) for feature in self.features[: len(layout.pooled_dims) + len(encoded_dims)]]
            dense_fields = [field for field, column in enumerate(schema.dense_columns, start=len(first_keys)) for _ in range(column.width)]
            self.register_buffer("first_keys", torch.tensor(first_keys, dtype=torch.long), persistent=False)
            self.register_buffer("dense_fields", torch.tensor(dense_fields, dtype=torch.long), persistent=False)
            self.register_buffer("stand_ins", torch.tensor(stand_ins), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """
        Returns:
            ``(batch, output_dim)`` float32.
        """
        dense, is_null = batch.dense, None
        if self.feature_dropout is not None:
            is_null = self.feature_dropout(self._empty_fields(batch.sparse, dense.shape[0]))
            dense = torch.where(is_null.index_select(1, self.dense_fields), self.stand_ins, dense)
        numbers: Tensor = self.normalization(dense)
        if self.number_nulls is not None:
            numbers = numbers + dense.isnan() * self.number_nulls
        if not self.embeddings.layout.keys:
            return numbers
        embedded = self.embeddings(batch.sparse)
        pooled, num_pooled = embedded.pooled, len(self._columns)
        if is_null is not None:
            pooled = self.pooled_nulls(pooled, is_null[:, :num_pooled])
        encoded = []
        for name, encoder in self.encoders.items():
            candidate = [pooled[:, self._columns[feature]] for feature in self._candidates[name]]
            encoded.append(encoder(embedded.sequences[name], torch.cat(candidate, dim=1) if candidate else pooled[:, :0]))
        if is_null is not None and encoded:
            encoded = [self.sequence_nulls(torch.cat(encoded, dim=1), is_null[:, num_pooled : num_pooled + len(encoded)])]
        return torch.cat([pooled, *encoded, numbers], dim=1)

    def _empty_fields(self, sparse: SparseFeatures, batch_size: int) -> Tensor:
        """``(batch, fields)`` bool: bags and sequences without an id. Numbers tell by themselves when they are missing."""
        lengths = sparse.lengths.view(len(sparse.keys), batch_size).index_select(0, self.first_keys)
        return functional.pad((lengths == 0).T, (0, len(self.features) - len(self.first_keys)))


def _stand_in(feature: Feature) -> float:
    """What a server finds in a column of ``Batch.dense`` where the feature is missing."""
    if isinstance(feature, Numeric):
        return math.nan if feature.default is None else feature.default
    return float(feature.default) if isinstance(feature, Binary) else 0.0
