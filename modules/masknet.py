"""Feature crossing by masks that an example makes for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlenv.errors import check_above, check_at_least
from mlenv.modules.field_tokens import FieldTokens
from mlenv.modules.mlp import check_dropout


@dataclass(frozen=True, kw_only=True)
class MaskNetConfig:
    structure: Literal["serial", "parallel"] = "serial"
    """Blocks one after the other, or side by side over the fields and concatenated."""
    num_blocks: int = 3
    """Mask blocks."""
    block_dim: int = 64
    """Output width of a block."""
    reduction_ratio: float = 2.0
    """Width inside the network that makes a mask, as a multiple of the mask's width."""
    token_dim: int = 16
    """Width that every field is brought to and normalized in."""
    dropout: float = 0.0
    """Share of a block's output that a training step hides."""

    def __post_init__(self) -> None:
        check_at_least("num_blocks", self.num_blocks, 1)
        check_at_least("block_dim", self.block_dim, 1)
        check_above("reduction_ratio", self.reduction_ratio, 0)
        check_at_least("token_dim", self.token_dim, 2)  # a layer norm over one number forgets the number
        check_dropout("dropout", self.dropout)

    def build(self, field_dims: Sequence[int]) -> MaskNet:
        return MaskNet(self, field_dims)


class MaskNet(nn.Module):
    """Multiplies fields, or what was made of them, by masks computed from all fields of the example.

    A block gives ``relu(norm(W (mask * values)))`` with ``mask = W_2 relu(W_1 fields + b_1) + b_2``. Its values are the
    fields, each normalized on its own; in the serial structure, from the second block on, the output of the block before.

    Source: Wang et al., "MaskNet", DLP-KDD 2021, arXiv:2102.07619, sections 3.2 to 3.4. The deep layers that the paper
    puts on the parallel structure are the ranker's heads.
    """

    def __init__(self, config: MaskNetConfig, field_dims: Sequence[int]) -> None:
        super().__init__()
        self.is_serial = config.structure == "serial"
        self.tokens = FieldTokens(field_dims, config.token_dim)
        self.scale = nn.Parameter(torch.ones(len(field_dims), config.token_dim))
        self.shift = nn.Parameter(torch.zeros(len(field_dims), config.token_dim))
        fields_dim = len(field_dims) * config.token_dim
        value_dims = [fields_dim] + [config.block_dim if self.is_serial else fields_dim] * (config.num_blocks - 1)
        self.blocks = nn.ModuleList(_MaskBlock(config, fields_dim, value_dim) for value_dim in value_dims)
        self.output_dim = config.block_dim * (1 if self.is_serial else config.num_blocks)

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, sum of field_dims)``, float32 or bfloat16.

        Returns:
            ``(batch, output_dim)``, >= 0.
        """
        tokens = self.tokens(inputs)
        fields = tokens.flatten(1)
        values = (functional.layer_norm(tokens, tokens.shape[2:]) * self.scale + self.shift).flatten(1)
        if not self.is_serial:
            return torch.cat([block(fields, values) for block in self.blocks], dim=1)
        for block in self.blocks:
            values = block(fields, values)
        return values


class _MaskBlock(nn.Module):
    def __init__(self, config: MaskNetConfig, fields_dim: int, value_dim: int) -> None:
        super().__init__()
        inner_dim = max(1, round(value_dim * config.reduction_ratio))
        # In place: the widest tensor of the block, which nothing else reads.
        self.mask = nn.Sequential(nn.Linear(fields_dim, inner_dim), nn.ReLU(inplace=True), nn.Linear(inner_dim, value_dim))
        linear = nn.Linear(value_dim, config.block_dim, bias=False)
        self.hidden = nn.Sequential(linear, nn.LayerNorm(config.block_dim), nn.ReLU(), nn.Dropout(config.dropout))

    def forward(self, fields: Tensor, values: Tensor) -> Tensor:
        outputs: Tensor = self.hidden(self.mask(fields) * values)
        return outputs
