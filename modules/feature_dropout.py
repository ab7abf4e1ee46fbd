"""Practising for the day when features do not arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mlenv.errors import ConfigError, nearest
from mlenv.modules.mlp import check_dropout
from mlenv.schema import Categorical, Schema


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    features: tuple[str, ...]
    """What comes from this source, and stays away with it."""
    rate: float
    """Share of the examples from which a training step hides all of it."""

    def __post_init__(self) -> None:
        check_dropout("rate", self.rate)
        if not self.features:
            raise ConfigError("features", expected="at least one feature", received=self.features)


@dataclass(frozen=True, kw_only=True)
class FeatureDropoutConfig:
    rate: float = 0.0
    """Share of the examples from which a training step hides a feature, drawn for each feature by itself."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Upstream sources, such as a feature store, whose features go missing together; a feature may have several."""

    def __post_init__(self) -> None:
        check_dropout("rate", self.rate)

    def build(self, schema: Schema, features: Sequence[str]) -> FeatureDropout:
        for name, source in self.sources.items():
            for feature in (feature for feature in source.features if feature not in features):
                key, fix = f"sources.{name}.features", nearest(feature, features)
                raise ConfigError(key, expected="features of the schema", received=feature, fix=fix)
        hidden = dict.fromkeys(features if self.rate else (), "rate")
        hidden |= {
            feature: f"sources.{name}.features" for name, source in self.sources.items() if source.rate for feature in source.features
        }
        for feature, key in hidden.items():
            kind = schema.features[feature]
            if isinstance(kind, Categorical) and kind.default is not None:
                received, fix = f"{feature} with the default {kind.default!r}", f"remove schema.features.{feature}.default"
                raise ConfigError(
                    key, expected="features that reach the model without an id when they are null", received=received, fix=fix
                )
        return FeatureDropout(self, features)


class FeatureDropout(nn.Module):
    """Hides features from a training step: one by one, and all that come from one source, example by example.

    What is left is not scaled up: a null takes the place of what is hidden, as it does when a feature really is missing.

    After: Volkovs et al., "DropoutNet: Addressing Cold Start in Recommender Systems", NeurIPS 2017.
    """

    rates: Tensor
    members: Tensor

    def __init__(self, config: FeatureDropoutConfig, features: Sequence[str]) -> None:
        super().__init__()
        self.num_features = len(features)
        rates = [config.rate] * len(features) + [source.rate for source in config.sources.values()]
        members = [[float(feature in source.features) for feature in features] for source in config.sources.values()]
        self.register_buffer("rates", torch.tensor(rates), persistent=False)
        self.register_buffer("members", torch.tensor(members).view(-1, len(features)), persistent=False)

    def forward(self, is_null: Tensor) -> Tensor:
        """
        Args:
            is_null: ``(batch, features)`` bool: what is missing in the data.

        Returns:
            ``(batch, features)`` bool: what is missing or hidden; in evaluation nothing is hidden.
        """
        if not self.training:
            return is_null
        drawn = torch.rand(is_null.shape[0], self.rates.shape[0], device=is_null.device) < self.rates
        of_features, of_sources = torch.split(drawn, [self.num_features, self.members.shape[0]], dim=1)
        hidden: Tensor = is_null | of_features | (of_sources.to(self.members.dtype) @ self.members > 0)
        return hidden
