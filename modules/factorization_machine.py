"""All products of two fields, at the cost of one pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mlenv.errors import check_at_least
from mlenv.modules.crossings import check_several_fields
from mlenv.modules.field_tokens import FieldTokens


@dataclass(frozen=True, kw_only=True)
class FactorizationMachineConfig:
    token_dim: int = 16
    """Width that every field is brought to."""
    output: Literal["scalar", "vector"] = "scalar"
    """The machine's own value, or the sum of the products of the pairs before it is summed over the width."""

    def __post_init__(self) -> None:
        check_at_least("token_dim", self.token_dim, 1)

    def build(self, field_dims: Sequence[int]) -> FactorizationMachine:
        check_several_fields("fm", field_dims)
        return FactorizationMachine(self, field_dims)


class FactorizationMachine(nn.Module):
    """Sums the products of all pairs of fields.

    With ``v`` the tokens, ``sum over i < j of v[i] * v[j] = ((sum of v)^2 - sum of v^2) / 2`` is the output ``vector``; the
    output ``scalar`` is the sum over its width plus the first-order term ``<w, x>``. Here the weight of an id in that term
    is a linear map of its vector, where the paper has a table of scalars; the constant is left to the head.

    Source: Rendle, "Factorization Machines", ICDM 2010, equation 1 and lemma 3.1; beside a deep network it is Guo et al.,
    "DeepFM", IJCAI 2017, arXiv:1703.04247. The vector is the bi-interaction pooling of He and Chua, "Neural Factorization
    Machines", SIGIR 2017, arXiv:1708.05027, section 3.
    """

    def __init__(self, config: FactorizationMachineConfig, field_dims: Sequence[int]) -> None:
        super().__init__()
        self.tokens = FieldTokens(field_dims, config.token_dim)
        self.first_order = nn.Linear(sum(field_dims), 1, bias=False) if config.output == "scalar" else None
        self.output_dim = config.token_dim if self.first_order is None else 1

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: ``(batch, sum of field_dims)``, float32 or bfloat16.

        Returns:
            ``(batch, 1)`` or ``(batch, token_dim)``.
        """
        tokens: Tensor = self.tokens(inputs)
        pairs = 0.5 * (tokens.sum(1).square() - (tokens * tokens).sum(1))  # the gradient of square() passes over them once more
        if self.first_order is None:
            return pairs
        value: Tensor = self.first_order(inputs) + pairs.sum(1, keepdim=True)
        return value
