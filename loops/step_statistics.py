"""What a step computes inside a model, part by part: for finding where a loss went wrong."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlenv.batch import Batch
from mlenv.loops.ranks import is_divided
from mlenv.loops.training_state import changing_buffers, put_back
from mlenv.modules.objective import Objective


@dataclass(frozen=True)
class Spread:
    """Of the values of one or several tensors."""

    min: float | None
    """Of the finite values, as ``max`` and ``mean``; None when no value is finite."""
    max: float | None
    mean: float | None
    non_finite: float
    """Share of the values that are NaN or infinite."""


@dataclass(frozen=True)
class ModuleStatistics:
    """Of a module's output."""

    module: str
    """Name within the model, as in ``named_modules``."""
    kind: str
    activations: Spread
    gradients: Spread | None
    """Of the loss with respect to the output; None where no gradient came."""


@dataclass(frozen=True)
class ParameterStatistics:
    """Of a parameter."""

    norm: float
    non_finite: float
    """Share of its values."""
    gradient_norm: float | None


@dataclass(frozen=True)
class StepStatistics:
    """One step, forward and backward, without the update."""

    losses: Mapping[str, float]
    """Terms of the objective by name."""
    modules: tuple[ModuleStatistics, ...]
    """In the order in which they finished."""
    parameters: Mapping[str, ParameterStatistics]

    @property
    def origin(self) -> str:
        """Where the first value that is not finite comes from, as the end of a sentence; else where the largest one does."""
        broken = [name for name, parameter in self.parameters.items() if parameter.non_finite]
        for module in self.modules:
            if module.activations.non_finite:
                own = [name for name in broken if name.rpartition(".")[0] == module.module]
                because = f", whose parameter {own[0]!r} holds such values" if own else ""
                return f"the first values that are not finite come from module {module.module!r} ({module.kind}){because}"
        if broken:
            return f"values that are not finite are in parameter {broken[0]!r}"
        sizes = {module.module: max(abs(module.activations.min or 0), abs(module.activations.max or 0)) for module in self.modules}
        largest = max(sizes, key=lambda name: sizes[name])
        return f"all modules give finite values, the largest of size {sizes[largest]:.4g} from module {largest!r}"

    def to_json(self) -> str:
        """As JSON; numbers that are not finite are the strings ``"nan"``, ``"inf"`` and ``"-inf"``."""
        return json.dumps(_plain(dataclasses.asdict(self)), indent=1, allow_nan=False)

    def __str__(self) -> str:
        lines = [f"{name} = {value:.6g}" for name, value in self.losses.items()]
        lines += [self.origin, "", _row("output of", "min", "max", "mean", "non-finite", "gradient min", "max", "non-finite")]
        for module in self.modules:
            of, back = module.activations, module.gradients or Spread(None, None, None, math.nan)
            lines.append(_row(module.module, of.min, of.max, of.mean, of.non_finite, back.min, back.max, back.non_finite))
        lines += ["", _row("parameter", "norm", "non-finite", "gradient norm")]
        lines += [_row(name, of.norm, of.non_finite, of.gradient_norm) for name, of in self.parameters.items()]
        return "\n".join(lines)


def step_statistics(
    model: nn.Module, objective: Objective, batch: Batch, autocast: Callable[[], AbstractContextManager[Any]]
) -> StepStatistics:
    """Runs a step over a batch on the model's device, and leaves the model and the random generators as they were.

    Tables that TorchRec updates inside the backward pass allow no such pass: there the gradients are left out.
    """
    has_fused_tables = hasattr(model, "fused_optimizer")
    outputs: dict[str, list[Tensor]] = {}
    gradients: dict[str, list[Tensor]] = {}
    kinds: dict[str, str] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            kinds[name] = type(module).__name__
            for tensor in _tensors(output):
                outputs.setdefault(name, []).append(tensor.detach())
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: gradients.setdefault(name, []).append(gradient.detach()))  # type: ignore[no-untyped-call]

        return hook

    hooks = [
        module.register_forward_hook(watch(name.replace("_dmp_wrapped_module.", "").removeprefix("module.") or "model"))
        for name, module in model.named_modules()
    ]
    buffers = changing_buffers(model, objective)
    before = [buffer.clone() for buffer in buffers]
    try:
        model.train()
        with torch.random.fork_rng():
            with torch.set_grad_enabled(not has_fused_tables), autocast(), torch.compiler.set_stance("force_eager"):
                logits = model(batch)
            losses = objective(logits, batch)
            if not has_fused_tables:
                objective.backward(losses, torch.Tensor.backward)
    finally:
        put_back(buffers, before)
        for hook in hooks:
            hook.remove()
    statistics = StepStatistics(
        losses=dict(zip(objective.terms, losses.terms.tolist(), strict=True)),
        modules=tuple(
            ModuleStatistics(name, kinds[name], _spread(tensors), _spread(gradients[name]) if name in gradients else None)
            for name, tensors in outputs.items()
        ),
        parameters={
            name.replace("_dmp_wrapped_module.", "").removeprefix("module."): _parameter(parameter)
            for name, parameter in [*model.named_parameters(), *(objective.named_parameters("objective"))]
        },
    )
    for parameter in (*model.parameters(), *objective.parameters()):
        parameter.grad = None
    return statistics


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in what a module returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _spread(tensors: list[Tensor]) -> Spread:
    values = torch.cat([_values(tensor).reshape(-1).double() for tensor in tensors])
    finite = values[torch.isfinite(values)]
    non_finite = 1 - len(finite) / len(values) if len(values) else 0.0
    if not len(finite):
        return Spread(None, None, None, non_finite)
    return Spread(float(finite.min()), float(finite.max()), float(finite.mean()), non_finite)


def _parameter(parameter: Tensor) -> ParameterStatistics:
    values = _values(parameter.detach())
    gradient = None if parameter.grad is None else float(torch.linalg.vector_norm(_values(parameter.grad)))
    non_finite = 1 - float(torch.isfinite(values).sum()) / max(values.numel(), 1)
    return ParameterStatistics(float(torch.linalg.vector_norm(values)), non_finite, gradient)


def _values(tensor: Tensor) -> Tensor:
    """The numbers of a tensor; of a sparse one those that are there, of a divided one those of all ranks."""
    if is_divided(tensor):
        return tensor.full_tensor()  # type: ignore[attr-defined,no-any-return]
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _row(name: str, *cells: str | float | None) -> str:
    texts = ["-" if cell is None else cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells]
    return name.ljust(52) + "".join(text.rjust(15) for text in texts)
