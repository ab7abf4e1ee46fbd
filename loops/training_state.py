"""All tensors that decide how a training goes on, by names that do not depend on the embedding engine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlenv.loops.ranks import rank

_TORCHREC_TABLE = re.compile(r"collections\.\w+\.(?:embedding_bags|embeddings)\.")


def model_tensors(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers; a TorchRec table has the name that it has as a plain one."""
    return {_canonical(name): tensor for name, tensor in model.state_dict().items()}


def parameter_names(model: nn.Module, objective: nn.Module) -> dict[Tensor, str]:
    """Names of all that is trained, as they stand in a checkpoint."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return names | {parameter: f"objective.{name}" for name, parameter in objective.named_parameters()}


def optimizer_tensors(model: nn.Module, names: Mapping[Tensor, str], optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Any]:
    """State of the optimizers, by the name of the parameter; that of TorchRec's fused one is taken from the model."""
    tensors: dict[str, Any] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer.{_canonical(names[parameter])}.{key}": value for key, value in state.items()}
    if hasattr(model, "fused_optimizer"):
        fused = model.fused_optimizer.state_dict()["state"]  # type: ignore[union-attr]
        for name, state in fused.items():
            tensors |= {f"optimizer.{_canonical(name)}.sum": value for key, value in state.items() if key.endswith(".momentum1")}
    return tensors


def random_tensors() -> dict[str, Tensor]:
    """State of the random generators that dropout draws from, which each rank has of its own."""
    tensors = {of_rank("random.cpu"): torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[of_rank("random.cuda")] = torch.cuda.get_rng_state()
    return tensors


def set_random_tensors(tensors: dict[str, Tensor]) -> None:
    """Puts the random generators back."""
    torch.set_rng_state(tensors[of_rank("random.cpu")])
    if of_rank("random.cuda") in tensors:
        torch.cuda.set_rng_state(tensors[of_rank("random.cuda")])


def of_rank(name: str, number: int | None = None) -> str:
    """The name of a tensor that every rank has of its own, for this rank or another; rank 0 is not named."""
    number = rank() if number is None else number
    return f"{name}.rank{number}" if number else name


def changing_buffers(*modules: nn.Module) -> list[Tensor]:
    """Buffers that a forward pass may change: those that a checkpoint holds, but not those of TorchRec's tables, which are their
    optimizer's and as long as they."""
    return [
        buffer
        for module in modules
        for part in module.modules()
        if not type(part).__module__.startswith(("torchrec.", "fbgemm_gpu."))
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    ]


def put_back(buffers: Iterable[Tensor], before: Iterable[Tensor]) -> None:
    """Gives buffers the values that they had."""
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def _canonical(name: str) -> str:
    """Without the wrapper that averages gradients, and as the engine of plain tables calls it."""
    return _TORCHREC_TABLE.sub("tables.", name.removeprefix("module."))
