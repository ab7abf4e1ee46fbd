"""Several crossings as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlenv.errors import ConfigError, placed_under
from mlenv.kinds import kind_field
from mlenv.modules.crossings import CROSSINGS, CrossingConfig


@dataclass(frozen=True, kw_only=True)
class CrossingStackConfig:
    crossings: tuple[CrossingConfig, ...] = kind_field(CROSSINGS)
    """The first one sees the fields; each other one sees what the one before gives, as a single field."""

    def __post_init__(self) -> None:
        _check_not_empty(self.crossings)

    def build(self, field_dims: Sequence[int]) -> CrossingStack:
        return CrossingStack(self, field_dims)


class CrossingStack(nn.Module):
    """Crosses one after the other, as in ``MaskNet -> DCN-V2``.

    Source: Zhang et al., "DHEN", DLP-KDD 2022, arXiv:2203.11014, section 3 (layers of interaction modules, without the
    shortcuts between them).
    """

    def __init__(self, config: CrossingStackConfig, field_dims: Sequence[int]) -> None:
        super().__init__()
        self.crossings = nn.Sequential()
        for place, crossing in enumerate(config.crossings):
            built = _build(crossing, field_dims, place)
            self.crossings.append(built)
            field_dims = (int(built.output_dim),)  # type: ignore[arg-type]
        self.output_dim = field_dims[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, sum of field_dims)``, float32 or bfloat16.

        Returns:
            ``(batch, output_dim)``, the output of the last crossing.
        """
        outputs: Tensor = self.crossings(inputs)
        return outputs


@dataclass(frozen=True, kw_only=True)
class CrossingEnsembleConfig:
    crossings: tuple[CrossingConfig, ...] = kind_field(CROSSINGS)
    """Each of them sees the fields."""

    def __post_init__(self) -> None:
        _check_not_empty(self.crossings)

    def build(self, field_dims: Sequence[int]) -> CrossingEnsemble:
        return CrossingEnsemble(self, field_dims)


class CrossingEnsemble(nn.Module):
    """Crosses side by side, as in DCN-V2 beside a transformer, and concatenates.

    Source: Zhang et al., "DHEN", DLP-KDD 2022, arXiv:2203.11014, section 3 (one layer, joined by concatenation).
    """

    def __init__(self, config: CrossingEnsembleConfig, field_dims: Sequence[int]) -> None:
        super().__init__()
        self.crossings = nn.ModuleList(_build(crossing, field_dims, place) for place, crossing in enumerate(config.crossings))
        self.output_dim = sum(int(crossing.output_dim) for crossing in self.crossings)  # type: ignore[arg-type, misc]

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, sum of field_dims)``, float32 or bfloat16.

        Returns:
            ``(batch, output_dim)``, in the order of the crossings.
        """
        return torch.cat([crossing(inputs) for crossing in self.crossings], dim=1)


def _build(crossing: CrossingConfig, field_dims: Sequence[int], place: int) -> nn.Module:
    with placed_under(f"crossings[{place}]"):
        return crossing.build(field_dims)


def _check_not_empty(crossings: Sequence[CrossingConfig]) -> None:
    if not crossings:
        raise ConfigError("crossings", expected="one crossing or more", received=[])
