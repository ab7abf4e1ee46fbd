"""Optimizers: row-wise Adagrad or Adam for embedding tables, Adam for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mlenv.config import EmbeddingsConfig, OptimizerConfig
from mlenv.modules.embeddings import TorchEmbeddings


class RowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one accumulator per table row, updating only the rows that a step looked up.

    ``sum[r] += mean(g[r]^2); w[r] -= learning_rate * g[r] / (sqrt(sum[r]) + eps)``, with the gradients of an id that
    occurs several times added up first: what fbgemm's fused kernel computes, for PyTorch's sparse gradients.

    Source: Mudigere et al., "Software-Hardware Co-design for Fast and Scalable Training of Deep Learning Recommendation
    Models", ISCA 2022, arXiv:2104.05158, section 4.1.
    """

    def __init__(self, tables: Iterable[Tensor], config: EmbeddingsConfig) -> None:
        super().__init__(tables, {"lr": config.learning_rate, "eps": config.eps, "weight_decay": config.weight_decay})
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


def build_adam(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Adam over dense parameters, with its state in place from the start, so that a checkpoint always has the same tensors."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, fused=True)
    _fill_state(adam, matrices + vectors)
    return adam


def build_table_optimizer(tables: list[Tensor], config: EmbeddingsConfig) -> torch.optim.Optimizer:
    """The optimizer of plain tables; like ``build_adam`` with its state in place.

    Adam here is that of Kingma and Ba (2015) with the penalty ``weight_decay / 2 * squared norm of the whole tables``: its gradient
    goes through the moments, unlike the decoupled decay of the dense parameters.
    """
    if config.optimizer == "row_wise_adagrad":
        return RowWiseAdagrad(tables, config)
    adam = torch.optim.Adam(tables, lr=config.learning_rate, eps=config.eps, weight_decay=config.weight_decay, fused=True)
    _fill_state(adam, tables)
    return adam


def _fill_state(adam: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        adam.state[parameter] = {"step": torch.zeros((), device=parameter.device), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
