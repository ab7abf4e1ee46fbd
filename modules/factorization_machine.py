"""All products of two fields, at the cost of one pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
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
        runs = self.tokens.runs_of(inputs)
        # A compiler fuses the plain formula, and an export knows no functions of ours.
        is_plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        pairs: Tensor = _pairs(runs) if is_plain else _PairsInOnePass.apply(*runs)  # type: ignore[no-untyped-call]
        if self.first_order is None:
            return pairs
        value: Tensor = self.first_order(inputs) + pairs.sum(1, keepdim=True)
        return value


def _pairs(runs: Sequence[Tensor]) -> Tensor:
    """Sum of the products of all pairs of tokens, ``(batch, token_dim)``."""
    squares = (runs[0] * runs[0]).sum(1)
    for tokens in runs[1:]:
        squares = squares + (tokens * tokens).sum(1)
    total = _sum(runs)
    return 0.5 * (total * total - squares)


def _sum(runs: Sequence[Tensor]) -> Tensor:
    total = runs[0].sum(1)
    for tokens in runs[1:]:
        total = total + tokens.sum(1)
    return total


class _PairsInOnePass(torch.autograd.Function):
    """``_pairs`` whose gradient, ``sum of v - v[i]`` for token i, passes over the tokens once; PyTorch's own would five times."""

    @staticmethod
    def forward(ctx: Any, *runs: Tensor) -> Tensor:
        ctx.save_for_backward(*runs)
        return _pairs(runs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        runs = ctx.saved_tensors
        total = _sum(runs).unsqueeze(1)  # summed again, so that the gradient has a gradient itself
        return tuple((total - tokens) * gradient.unsqueeze(1) for tokens in runs)
