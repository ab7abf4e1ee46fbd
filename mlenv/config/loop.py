"""How long to train, with what, and what to keep: ``optimizer`` and ``loop`` of a config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from mlenv.errors import ConfigError, check_above, check_at_least
from mlenv.kinds import class_of

if TYPE_CHECKING:
    import torch
    from torch import nn


class OptimizerConfig(Protocol):
    """Builds the optimizer of all that is not an embedding table, with its state in place from the start."""

    @property
    def learning_rate(self) -> float:
        """Before warm-up and decay."""

    @property
    def gradient_clip_norm(self) -> float:
        """Largest norm of the gradient of the dense parameters, and of tables under Adam with them; 0 does not clip."""

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer: ...


OPTIMIZERS: dict[str, type | str] = {
    "adam": "mlenv.loops.dense_optimizers:AdamConfig",
    "adamw": "mlenv.loops.dense_optimizers:AdamWConfig",
    "lion": "mlenv.loops.lion:LionConfig",
    "sgd": "mlenv.loops.dense_optimizers:SGDConfig",
}
"""Optimizers by the name that ``optimizer.kind`` takes."""


def adamw() -> OptimizerConfig:
    config: OptimizerConfig = class_of("adamw", OPTIMIZERS, "optimizer")()
    return config


MONITORS: dict[str, bool] = {"auc": True, "grouped_auc": True, "log_loss": False, "normalized_entropy": False, "ece": False}
"""Metrics that the best step can be chosen by, and whether higher is better."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train, on what, and what to keep."""

    max_steps: int = 0
    """Optimizer steps; 0 trains to the end of ``data.num_epochs``."""
    warmup_steps: int = 0
    """Steps over which all learning rates, the tables' too, rise in a straight line; 0 starts with the whole rates."""
    warmup_start: float = 0.1
    """Share of the rates at the first of them."""
    learning_rate_decay: Literal["none", "linear", "cosine", "plateau"] = "none"
    """linear lowers all learning rates, the tables' too, to zero at the end, from the end of the warm-up on; a single pass ends
    better calibrated so. cosine does the same along half a cosine.
    plateau divides them by ten, not below 1e-6, at every evaluation that brings no better ``monitor``."""
    accumulate_batches: int = 1
    """Batches that make one optimizer step. Their gradients are added up, weighed so that the step is that of one batch as large as all
    of them; layers that normalize over a batch still see one at a time."""
    ema_decay: float = 0.0
    """Of a running average of the dense weights, at most (1 + t) / (10 + t) at step t; the average is what is evaluated and kept as the
    model. Tables are not averaged. 0 keeps none."""
    log_every_steps: int = 50
    """Steps between two records of the loss."""
    evaluate_every_steps: int = 0
    """Steps between two evaluations on the validation window; 0 never."""
    monitor: str = ""
    """Validation metric, such as click/auc, whose best evaluation is the model that is kept; empty keeps the last step."""
    stop_after_evaluations: int = 0
    """Evaluations in a row without a better ``monitor`` after which the training stops; 0 never."""
    checkpoint_every_steps: int = 1000
    """Steps between two checkpoints; a killed run loses at most these."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay."""
    keep_every_steps: int = 0
    """Steps between two checkpoints that stay for ever, each with the best model so far; a multiple of ``checkpoint_every_steps``.
    0 keeps none of them."""
    checkpoint_url: str = ""
    """Where checkpoints are copied to, such as s3://bucket/run, with the same ones kept there: a training on another machine goes on from
    them. A URL that fsspec has a driver for; empty copies nothing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes train all that TorchRec does not shard: ddp, which auto takes, copies it to each; fsdp divides weights,
    gradients and optimizer states, for dense parts too large for that. One process trains the same with any of them."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """bf16-mixed computes the dense part in bfloat16 and keeps float32 weights."""
    compile: Literal["none", "kernels", "cuda_graphs"] = "none"
    """What becomes of the model behind its embeddings in training steps. kernels: torch.compile makes fused kernels of it, once,
    for full batches. cuda_graphs: a GPU also replays them without the host's starting each. It is tried before the first step, and
    what cannot be compiled stays as it is, with a warning."""
    read_ahead: bool | None = None
    """Whether batches are sent to the device, and their ids to the processes that hold the rows, while the step before computes; null
    does so on a GPU. The numbers are the same."""
    profile_steps: int = 0
    """Steps of which a trace and a page about them are written to the output folder, after ten that are not looked at; 0 for none."""
    peak_tflops: float | None = None
    """Of the device at best, for ``train/model_flops_utilization``; null takes that of well-known GPUs."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose loss is no number or above ``max_loss``; either way the model does not learn from it, and the step is
    kept in the output folder. skip goes on with the next batch."""
    max_loss: float | None = None
    """Largest loss of a task, as it is recorded, that the model learns from; null for any finite one."""
    max_skipped_steps: int = 10
    """Steps of a training that may be skipped; one more stops it."""
    hang_timeout_seconds: float = 0
    """When no step has ended for so long, the stacks of all threads are written to the output folder, and after as long again the process
    ends with exit code 1. Longer than a step with an evaluation and a checkpoint takes; 0 waits for ever."""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_steps", 0),
            ("warmup_steps", 0),
            ("accumulate_batches", 1),
            ("log_every_steps", 1),
            ("evaluate_every_steps", 0),
            ("stop_after_evaluations", 0),
            ("checkpoint_every_steps", 1),
            ("keep_checkpoints", 1),
            ("keep_every_steps", 0),
            ("max_skipped_steps", 0),
            ("hang_timeout_seconds", 0),
            ("profile_steps", 0),
        ):
            check_at_least(name, getattr(self, name), least)
        if not 0 <= self.ema_decay < 1:
            raise ConfigError("ema_decay", expected="a number in [0, 1)", received=self.ema_decay)
        if not 0 < self.warmup_start < 1:
            raise ConfigError("warmup_start", expected="a share in (0, 1)", received=self.warmup_start)
        if not self.warmup_steps and self.warmup_start != LoopConfig.warmup_start:
            fix = "set warmup_steps, or take warmup_start out"
            raise ConfigError("warmup_steps", expected="a number >= 1 with warmup_start", received=0, fix=fix)
        if 0 < self.max_steps <= self.warmup_steps:
            fix = "shorten the warm-up, or train longer"
            raise ConfigError("warmup_steps", expected=f"fewer than max_steps, {self.max_steps}", received=self.warmup_steps, fix=fix)
        if self.peak_tflops is not None:
            check_above("peak_tflops", self.peak_tflops, 0)
        if self.keep_every_steps % self.checkpoint_every_steps:
            expected = f"a multiple of checkpoint_every_steps, {self.checkpoint_every_steps}"
            raise ConfigError("keep_every_steps", expected=expected, received=self.keep_every_steps)
        if self.max_loss is not None:
            check_above("max_loss", self.max_loss, 0)
