"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from mlenv.batch import START, Batch, Position
from mlenv.config import LoopConfig
from mlenv.loops.train_step import StepOutput, TrainStep
from mlenv.schema import Schema


@dataclass(frozen=True)
class Progress:
    """How far a training is; saved and restored whole."""

    step: int = 0
    examples: int = 0
    position: Position = START
    """Taken from the batch that was trained, not the last one read: prefetching loses no rows."""

    def after(self, output: StepOutput) -> Progress:
        """Progress once a step is done."""
        return Progress(self.step + 1, self.examples + output.num_examples, output.position)


class BatchSource(Protocol):
    """Batches of a schema, from any position on."""

    schema: Schema

    def batches(self, start: Position = START) -> Iterator[Batch]: ...


class Run(Protocol):
    """Where this run's numbers and checkpoints go."""

    def restore(self) -> Progress: ...
    def log(self, progress: Progress, output: StepOutput) -> None: ...
    def evaluate(self, progress: Progress) -> None: ...
    def save(self, progress: Progress) -> None: ...


def fit(step: TrainStep, source: BatchSource, run: Run, config: LoopConfig) -> Progress:
    """Trains from the last checkpoint to ``config.max_steps`` or the end of the data."""
    progress = run.restore()
    saved_step = progress.step
    batches = source.batches(start=progress.position)
    while not config.max_steps or progress.step < config.max_steps:
        output = step.advance(batches)
        if output is None:
            break
        progress = progress.after(output)
        run.log(progress, output)
        if config.evaluate_every_steps and progress.step % config.evaluate_every_steps == 0:
            run.evaluate(progress)
        if progress.step % config.checkpoint_every_steps == 0:
            run.save(progress)
            saved_step = progress.step
    if progress.step > saved_step:
        run.save(progress)
    return progress
