"""Compiling what a model computes behind its embeddings."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from mlenv.batch import Batch
from mlenv.errors import ConfigError
from mlenv.loops.ranks import any_rank
from mlenv.loops.training_state import changing_buffers, put_back

logger = logging.getLogger(__name__)

COMPILATION_FILE: Final = "compile.json"

_TIMED_RUNS: Final = 5
_MODES: Final = {"kernels": None, "cuda_graphs": "reduce-overhead"}
"""What torch.compile calls them."""

Autocast = Callable[[], AbstractContextManager[Any]]
DensePart = Callable[[Tensor], Tensor]


class _Owner(Protocol):
    training: bool
    dense_part: DensePart


@dataclass(frozen=True)
class Compilation:
    """What came of compiling."""

    mode: str
    compiled: bool
    reason: str
    """Why it stays as it is; empty when it is compiled."""
    seconds: float
    """That compiling took, or failing to; a second training finds the kernels in TORCHINDUCTOR_CACHE_DIR."""
    eager_ms: float
    """Forward and backward of the part over a full batch, as it was."""
    compiled_ms: float | None
    """The same, compiled."""

    def __str__(self) -> str:
        if not self.compiled:
            return f"not compiled: {self.reason}"
        return f"{self.mode} in {self.seconds:.1f} s; a pass of {self.eager_ms:.1f} ms takes {self.compiled_ms:.1f} ms"


def owner_of_dense_part(model: nn.Module) -> nn.Module:
    """The module of the model that has a method ``dense_part``: what it computes of one ``(batch, dim)`` tensor.

    Raises:
        ConfigError: there is none.
    """
    found = next((module for module in model.modules() if hasattr(module, "dense_part")), None)
    if found is None:
        fix = "move what follows the embeddings there, or set loop.compile to none"
        expected = "none, because no module of the model has a method dense_part(inputs)"
        raise ConfigError("loop.compile", expected=expected, received=type(model).__name__, fix=fix)
    return found


def compile_dense_part(model: nn.Module, probe: Batch, mode: Literal["kernels", "cuda_graphs"], autocast: Autocast) -> Compilation:
    """Puts a compiled dense part in the place of the model's own, for training steps over batches as large as the probe.

    Other batches, such as the last one, and evaluation take the model's own, so nothing is ever compiled again. The trial leaves
    weights, gradients, buffers and random numbers as they were. When it fails, on any rank, the model's own part stays.

    Args:
        probe: a full batch on the model's device; its values do not matter.

    Raises:
        ConfigError: no module of the model has a method ``dense_part``.
    """
    module = owner_of_dense_part(model)
    owner, eager = cast(_Owner, module), cast(_Owner, module).dense_part
    inputs = _inputs_of(model, owner, probe, autocast)
    with _nothing_changed(module):
        eager_ms = _milliseconds(module, eager, inputs, autocast)
        compiled = cast(DensePart, torch.compile(eager, dynamic=False, mode=_MODES[mode]))
        started, reason, compiled_ms = time.perf_counter(), "", None
        try:
            _run(module, compiled, inputs, autocast)
            seconds = time.perf_counter() - started
            compiled_ms = _milliseconds(module, compiled, inputs, autocast)
        except Exception as error:  # noqa: BLE001 - whatever the compiler does, the training goes on
            seconds, reason = time.perf_counter() - started, _reason(error)
    if any_rank(bool(reason)):
        reason = reason or "another process could not compile it"
        logger.warning("loop.compile: the model is trained as it is, because compiling failed. %s", reason)
        return Compilation(mode, False, reason, seconds, eager_ms, None)

    def dense_part(inputs_now: Tensor) -> Tensor:
        if not (owner.training and inputs_now.shape[0] == len(probe)):
            return eager(inputs_now)
        if mode == "cuda_graphs":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # what the step before left in the graph's memory is no longer read
        return compiled(inputs_now)

    owner.dense_part = dense_part
    done = Compilation(mode, True, "", seconds, eager_ms, compiled_ms)
    logger.info("loop.compile: %s", done)
    return done


def _inputs_of(model: nn.Module, owner: _Owner, probe: Batch, autocast: Autocast) -> Tensor:
    """What the dense part reads: its shape, type and whether a gradient flows back through it."""
    seen: list[Tensor] = []

    def watched(inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return own(inputs)

    own, was_training = owner.dense_part, model.training
    owner.dense_part = watched
    model.eval()
    try:
        with autocast():
            model(probe)
    finally:
        del owner.dense_part
        model.train(was_training)
    return seen[0].detach().requires_grad_(seen[0].requires_grad)


@contextmanager
def _nothing_changed(module: nn.Module) -> Iterator[None]:
    """Puts back what a training step changes beside the weights."""
    was_training, buffers = module.training, changing_buffers(module)
    before = [buffer.clone() for buffer in buffers]
    module.train()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own, about its own parts
            yield
    finally:
        put_back(buffers, before)
        module.train(was_training)


def _run(module: nn.Module, part: DensePart, inputs: Tensor, autocast: Autocast) -> None:
    """Forward and backward. The gradients are not left in the parameters, where a wrapper would begin to average them."""
    with autocast():
        logits = part(inputs)
    wanted = [tensor for tensor in (inputs, *module.parameters()) if tensor.requires_grad]
    torch.autograd.grad(logits.sum(), wanted, allow_unused=True)
    if inputs.is_cuda:
        torch.cuda.synchronize()


def _milliseconds(module: nn.Module, part: DensePart, inputs: Tensor, autocast: Autocast) -> float:
    """The median of a few runs, after one that nobody counts."""
    seconds = []
    for _ in range(_TIMED_RUNS + 1):
        started = time.perf_counter()
        _run(module, part, inputs, autocast)
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[1:])


def _reason(error: BaseException) -> str:
    """The first line of what went wrong inside the compiler."""
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error
    return f"{type(inner).__name__}: {str(inner).strip().partition(chr(10))[0]}"
