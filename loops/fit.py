"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Protocol

from mlenv.batch import START, Batch, Position
from mlenv.config import LoopConfig
from mlenv.loops.train_step import StepOutput, TrainStep
from mlenv.schema import Schema

IMPROVEMENT: Final = 1e-6
"""An evaluation is better when it gains more than this."""


@dataclass(frozen=True)
class Progress:
    """How far a training is; saved and restored whole."""

    step: int = 0
    examples: int = 0
    position: Position = START
    """Taken from the batch that was trained, not the last one read: prefetching loses no rows."""
    best: float | None = None
    """Best value of the monitor so far; None before the first evaluation."""
    stale_evaluations: int = 0
    """Evaluations since the best one."""
    decays: int = 0
    """Evaluations in all that brought no better monitor: so often has the plateau schedule cut the learning rates."""
    skipped_steps: int = 0
    """Steps whose loss was bad, so that the model learned nothing from them."""

    def after(self, output: StepOutput) -> Progress:
        """Progress once a step is done."""
        examples, skipped = self.examples + output.num_examples, self.skipped_steps + output.is_skipped
        return replace(self, step=self.step + 1, examples=examples, position=output.position, skipped_steps=skipped)

    def judged(self, value: float, higher_is_better: bool) -> Progress:
        """Progress once the monitor was measured."""
        if self.best is None or (value - self.best if higher_is_better else self.best - value) > IMPROVEMENT:
            return replace(self, best=value, stale_evaluations=0)
        return replace(self, stale_evaluations=self.stale_evaluations + 1, decays=self.decays + 1)

    def is_complete(self, config: LoopConfig) -> bool:
        """Whether all steps are done, or the training stopped because it got no better; the end of the data is found by reading."""
        has_all_steps = 0 < config.max_steps <= self.step
        has_gone_stale = 0 < config.stop_after_evaluations <= self.stale_evaluations
        return has_all_steps or has_gone_stale


class BatchSource(Protocol):
    """Batches of a schema, from any position on."""

    schema: Schema

    def batches(self, start: Position = START) -> Iterator[Batch]: ...


class Run(Protocol):
    """Where this run's numbers and checkpoints go."""

    def restore(self) -> Progress: ...
    def log(self, progress: Progress, output: StepOutput) -> None: ...
    def evaluate(self, progress: Progress) -> Progress: ...
    def save(self, progress: Progress) -> None: ...
    def must_stop(self, progress: Progress) -> bool: ...
    def finish(self, progress: Progress) -> None: ...


def fit(step: TrainStep, source: BatchSource, run: Run, config: LoopConfig) -> Progress:
    """Trains from the last checkpoint until ``config.max_steps``, the end of the data, or no gain for too long.

    Raises:
        StoppedError: the process was asked to end; the last step is saved.
    """
    progress = run.restore()
    batches = source.batches(start=progress.position)
    while not (progress.is_complete(config) or run.must_stop(progress)):
        output = step.advance(batches, progress)
        if output is None:
            break
        progress = progress.after(output)
        run.log(progress, output)
        if config.evaluate_every_steps and progress.step % config.evaluate_every_steps == 0:
            progress = run.evaluate(progress)
        if progress.step % config.checkpoint_every_steps == 0:
            run.save(progress)
    run.finish(progress)
    return progress
