"""Optimizers of plain embedding tables, each table by its own; which parameters are left for the dense optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mlenv.config import EmbeddingsConfig
from mlenv.loops.dense_optimizers import with_adam_state
from mlenv.modules.embeddings import TorchEmbeddings


class RowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one accumulator per table row, updating only the rows that a step looked up.

    ``sum[r] += mean(g[r]^2); w[r] -= learning_rate * g[r] / (sqrt(sum[r]) + eps)``, with the gradients of an id that
    occurs several times added up first: what fbgemm's fused kernel computes, for PyTorch's sparse gradients.

    Source: Mudigere et al., "Software-Hardware Co-design for Fast and Scalable Training of Deep Learning Recommendation
    Models", ISCA 2022, arXiv:2104.05158, section 4.1.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """
        Args:
            groups: with ``params``, the tables, ``lr``, ``eps`` and ``weight_decay``.
        """
        super().__init__(groups, {})
        for table in (table for group in self.param_groups for table in group["params"]):
            self.state[table]["sum"] = torch.zeros(table.shape[0], device=table.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the rows that have a gradient."""
        assert closure is None, "this optimizer does not evaluate the loss itself"
        for group in self.param_groups:
            for table in (table for table in group["params"] if table.grad is not None):
                gradient = table.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                if group["weight_decay"]:
                    values = values + group["weight_decay"] * table[rows]
                accumulated = self.state[table]["sum"].index_add_(0, rows, values.square().mean(1))[rows]
                table.index_add_(0, rows, values / (accumulated.sqrt() + group["eps"]).unsqueeze(1), alpha=-group["lr"])


def plain_tables(model: nn.Module) -> list[Tensor]:
    """Embedding tables that an optimizer steps: those with sparse gradients, and all of ``TorchEmbeddings``."""
    owned = {id(table) for module in model.modules() if isinstance(module, TorchEmbeddings) for table in module.tables.values()}
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding) and (module.sparse or id(module) in owned)]


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but embedding tables, plain or with a fused optimizer."""
    tables = {id(table) for table in plain_tables(model)}
    return [
        parameter for parameter in model.parameters() if id(parameter) not in tables and not hasattr(parameter, "_in_backward_optimizers")
    ]


def options_of_tables(model: nn.Module, config: EmbeddingsConfig) -> list[tuple[Tensor, EmbeddingsConfig]]:
    """Plain tables, each with the options that it is trained by; a table of the model's own is not named, so it has those of all."""
    embeddings = [module for module in model.modules() if isinstance(module, TorchEmbeddings)]
    names = {id(table.weight): name for module in embeddings for name, table in module.tables.items()}
    return [(table, config.of(names.get(id(table), ""))) for table in plain_tables(model)]


def build_table_optimizers(tables: Iterable[tuple[Tensor, EmbeddingsConfig]]) -> list[torch.optim.Optimizer]:
    """The optimizers of plain tables, at most one of a kind, with their state in place from the start.

    Adam here is that of Kingma and Ba (2015) with the penalty ``weight_decay / 2 * squared norm of the whole tables``: its gradient
    goes through the moments, unlike the decoupled decay of AdamW. SGD has no state and touches the rows that a step looked up.
    """
    kinds: dict[str, dict[tuple[float, ...], dict[str, Any]]] = {}
    for table, options in tables:
        groups = kinds.setdefault(options.optimizer, {})
        group = {"params": [], "lr": options.learning_rate, "eps": options.eps, "weight_decay": options.weight_decay}
        groups.setdefault((options.learning_rate, options.eps, options.weight_decay), group)["params"].append(table)
    return [_build(kind, list(groups.values())) for kind, groups in kinds.items()]


def _build(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if kind == "row_wise_adagrad":
        return RowWiseAdagrad(groups)
    if kind == "sgd":
        return torch.optim.SGD(groups)
    return with_adam_state(torch.optim.Adam(groups, fused=True))
