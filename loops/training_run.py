"""Where a training's numbers and checkpoints go: the journal, the checkpoints, the progress bar."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mlenv.batch import Position
from mlenv.config import CONFIG_FILE, MONITORS
from mlenv.errors import CheckpointError, StoppedError, TrainingError
from mlenv.loops.checkpoint import list_checkpoints, load_tensors, newest_checkpoint, save_checkpoint
from mlenv.loops.fit import Progress
from mlenv.loops.journal import JOURNAL_FILE, Journal, SilentJournal
from mlenv.loops.ranks import all_ranks, any_rank, from_main, is_main, rank, summed, world_size
from mlenv.loops.stop_signals import StopSignals
from mlenv.loops.train_step import StepOutput
from mlenv.loops.training_state import of_rank, random_tensors, set_random_tensors
from mlenv.loops.watchdog import Watchdog

logger = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "checkpoints"
BEST_FOLDER = "best"
PROGRESS = "progress.json"
CONFIG = CONFIG_FILE


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How often a run writes, and what it writes about itself."""

    terms: tuple[str, ...]
    """Names of the terms of the objective, such as ``click/loss``."""
    log_every_steps: int
    keep_checkpoints: int
    monitor: str
    """``task/metric`` that the best model is chosen by; empty chooses none."""
    total_steps: int
    """Steps that the whole training will take, for the progress bar."""
    config: str
    """The composed config as YAML; saved with every checkpoint."""
    fingerprints: Mapping[str, str]
    """Of the training data, and of the teacher's checkpoint: a training that goes on must go on with the same."""
    max_loss: float | None = None
    """A step with a larger loss is a bad one; None for no limit."""
    hang_timeout_seconds: float = 0
    """Longest time between two steps; 0 waits for ever."""


class UnseenLossError(TrainingError):
    """A loss that is no number or too large was only found when it was recorded, after the model had learned from it."""


class TrainingRun:
    """Keeps a run in its output folder.

    Args:
        output: folder of the run.
        state: gives all tensors of model and optimizers; they are saved as they are, and loaded in place.
        begin: prepares a model that starts from nothing, such as its normalization.
        check: refuses the config of a checkpoint that the training cannot continue from.
        started: is told when the training begins or continues, and nothing can refuse it any more.
        validate: measures the model on held-out rows: ``task/metric`` to value.
        gauges: what else to record of the training, by name; asked for when the losses are recorded.
        signals: those that ask the process to end; held while steps are trained.
        on_evaluation: is told of the step and the metrics of every evaluation before the last step; what it raises ends the training.
    """

    def __init__(
        self,
        output: Path,
        options: RunOptions,
        *,
        state: Callable[[], dict[str, Any]],
        begin: Callable[[], None],
        check: Callable[[Path, str], None],
        started: Callable[[], None],
        validate: Callable[[], Mapping[str, float]],
        gauges: Callable[[], Mapping[str, float]],
        signals: StopSignals,
        on_evaluation: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.journal: Journal | SilentJournal = Journal(output / JOURNAL_FILE) if is_main() else SilentJournal()
        self._checkpoints, self._best, self._options = output / CHECKPOINT_FOLDER, output / BEST_FOLDER, options
        self._state, self._begin, self._check, self._started = state, begin, check, started
        self._validate, self._gauges, self._signals = validate, gauges, signals
        self._on_evaluation = on_evaluation
        self._saved_step, self._is_disk_full = 0, False
        timeout = options.hang_timeout_seconds
        self._watchdog = Watchdog(output, timeout) if timeout else None
        # What was seen since the last record; part of the checkpoint, so that a resumed run logs the same numbers.
        self._sums = {name: torch.zeros(len(options.terms), dtype=torch.float64) for name in ("losses", "weights")}
        self._largest = torch.zeros(())
        self._seconds, self._examples = time.perf_counter(), 0
        self._bar: tqdm[Any] | None = None

    def restore(self) -> Progress:
        """Continues from the newest good checkpoint, or begins.

        Raises:
            CheckpointError: the checkpoint belongs to another config or to other data, or all checkpoints are damaged.
        """
        found = from_main(str((is_main() and newest_checkpoint(self._checkpoints)) or ""))  # only rank 0 reads all to verify it
        checkpoint = Path(found) if found else None
        if checkpoint is None:
            self._begin()
            progress = Progress()
        else:
            progress = self._load(checkpoint)
            logger.info("continues from %s, step %d", checkpoint, progress.step)
        self.journal.truncate(progress.step)
        if is_main():
            self._forget_best(after="" if checkpoint is None else checkpoint.name)
            self._started()
            self._bar = tqdm(
                total=self._options.total_steps,
                initial=progress.step,
                unit="step",
                desc="train",
                disable=None,
                leave=False,
                dynamic_ncols=True,
            )
        self._seconds, self._examples, self._saved_step = time.perf_counter(), progress.examples, progress.step
        self._signals.hold()
        if self._watchdog is not None:
            self._watchdog.start()
        return progress

    def must_stop(self, progress: Progress) -> bool:
        """Whether the process was asked to end. Several ranks agree on the step: one of those that are logged, where they wait anyway."""
        if world_size() > 1 and progress.step % self._options.log_every_steps:
            return False
        return any_rank(bool(self._signals.received))

    def log(self, progress: Progress, output: StepOutput) -> None:
        """Adds a step to the running means, and writes them every ``log_every_steps``. Only then waits for the device."""
        self._sums = {
            "losses": self._sums["losses"].to(output.losses.device) + output.losses * output.weights,
            "weights": self._sums["weights"].to(output.weights.device) + output.weights,
        }
        if self._options.max_loss is not None:
            self._largest = torch.maximum(self._largest.to(output.losses.device), output.losses.max())
        if progress.step % self._options.log_every_steps == 0:
            self._record(progress)
        if self._bar is not None:
            self._bar.update()
        if self._watchdog is not None:
            self._watchdog.beat()

    def evaluate(self, progress: Progress) -> Progress:
        """Writes the metrics of the validation window, and keeps the model when its monitor is the best so far.

        Raises:
            TrainingError: the monitor is no number, or the best model cannot be written: a later one cannot take its place.
        """
        started = time.perf_counter()
        metrics, monitor = self._validate(), self._options.monitor
        self.journal.append(progress.step, {f"validation/{name}": value for name, value in metrics.items()})
        if monitor:
            if not math.isfinite(metrics[monitor]):
                fix = "choose a validation window with both labels, or lower the learning rates if the training diverged"
                raise TrainingError(f"step {progress.step}: validation/{monitor} is {metrics[monitor]}. Fix: {fix}.")
            progress = progress.judged(metrics[monitor], MONITORS[monitor.rpartition("/")[2]])
            if progress.stale_evaluations == 0:
                try:
                    self._write(self._best, progress, keep=0)
                except OSError as error:
                    raise _unwritten("best model", progress, error) from error
        if self._on_evaluation is not None and progress.step < self._options.total_steps:
            self._on_evaluation(progress.step, metrics)
        self._seconds += time.perf_counter() - started
        return progress

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint. A full disk costs the checkpoint, not the training: the ones before it stay."""
        try:
            self._save(progress)
        except OSError as error:
            if not self._is_disk_full:
                logger.warning(
                    "step %d: the checkpoint cannot be written (%s). The training goes on; a kill would take it back to step %d.",
                    progress.step,
                    error,
                    self._saved_step,
                )
            self._is_disk_full = True

    def finish(self, progress: Progress) -> None:
        """Writes the last checkpoint, unless it is there.

        Raises:
            StoppedError: the process was asked to end.
            TrainingError: the checkpoint cannot be written.
        """
        if progress.step > self._saved_step:
            try:
                self._save(progress)
            except OSError as error:
                raise _unwritten("last checkpoint", progress, error) from error
        if self._watchdog is not None:
            self._watchdog.close()
        self._signals.release()
        if any_rank(bool(self._signals.received)):
            raise StoppedError(f"{self._signals.received or 'a signal to another process'} after step {progress.step}")

    def _save(self, progress: Progress) -> None:
        """Writes a checkpoint. What was logged before it is on the disk first."""
        self._write(self._checkpoints, progress, keep=self._options.keep_checkpoints)
        self._saved_step, self._is_disk_full = progress.step, False

    def _write(self, folder: Path, progress: Progress, keep: int) -> None:
        self._check_finite(progress, summed(self._sums["losses"]))
        self.journal.sync()
        tensors = {**self._state(), **random_tensors(), **self._own_sums()}
        record = dataclasses.asdict(progress) | {"position": all_ranks(dataclasses.astuple(progress.position))}
        documents = {
            PROGRESS: json.dumps(record | {"fingerprints": dict(self._options.fingerprints)}, indent=2),
            CONFIG: self._options.config,
        }
        save_checkpoint(folder, progress.step, tensors, documents, keep)
        if is_main():
            self._prune_best()

    def _own_sums(self) -> dict[str, Tensor]:
        return {of_rank(f"run.{name}"): sums.cpu() for name, sums in self._sums.items()}

    def _prune_best(self) -> None:
        """Leaves the best model of all, and the best one as of each checkpoint that a killed training may go on from."""
        best = list_checkpoints(self._best)
        starts = list_checkpoints(self._checkpoints)
        needed = {max((path for path in best if path.name <= start.name), default=None) for start in starts}
        for path in (path for path in best[:-1] if path not in needed):
            shutil.rmtree(path)

    def _forget_best(self, after: str) -> None:
        """Removes the best models of steps that a killed training has lost."""
        for path in (path for path in list_checkpoints(self._best) if path.name > after):
            shutil.rmtree(path)

    def _check_finite(self, progress: Progress, losses: Tensor) -> None:
        """Refuses to write a model whose loss is no number any more: the checkpoints before it are worth more."""
        for term, loss in zip(self._options.terms, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                fix = "lower the learning rates, or set optimizer.gradient_clip_norm; the same command goes on from the last checkpoint"
                raise UnseenLossError(f"step {progress.step}: {term!r} is {loss}. Fix: {fix}.")
        limit, largest = self._options.max_loss, float(self._largest)
        if limit is not None and largest > limit:
            fix = "lower the learning rates, or raise loop.max_loss"
            raise UnseenLossError(f"step {progress.step}: a loss of {largest:.6g} is above loop.max_loss, {limit:.6g}. Fix: {fix}.")

    def close(self) -> None:
        """Ends the progress bar and the watchdog."""
        if self._watchdog is not None:
            self._watchdog.close()
        if self._bar is not None:
            self._bar.close()

    def _load(self, checkpoint: Path) -> Progress:
        self._check(checkpoint, (checkpoint / CONFIG).read_text())
        record = json.loads((checkpoint / PROGRESS).read_text())
        found, now = record.pop("fingerprints"), self._options.fingerprints
        for what in (what for what in {**found, **now} if found.get(what) != now.get(what)):
            fix = "put the files back as they were, or start over with another output"
            expected = f"the files it was trained with ({found.get(what)})"
            raise CheckpointError(f"{checkpoint}, {what}", expected=expected, received=now.get(what), fix=fix)
        positions = record.pop("position")
        if len(positions) != world_size():
            fix = f"run it with {len(positions)} processes, or train in another output folder"
            expected = f"{len(positions)} processes, among which the data were divided"
            raise CheckpointError(f"{checkpoint}, position", expected=expected, received=world_size(), fix=fix)
        random, sums = random_tensors(), self._own_sums()
        load_tensors(checkpoint, {**self._state(), **random, **sums})
        set_random_tensors(random)
        self._sums = {name: sums[of_rank(f"run.{name}")] for name in self._sums}
        return Progress(**record, position=Position(*positions[rank()]))

    def _record(self, progress: Progress) -> None:
        sums = {name: summed(sums) for name, sums in self._sums.items()}
        self._check_finite(progress, sums["losses"])
        losses = self._means(sums["losses"], sums["weights"])
        now = time.perf_counter()
        values = dict(zip(self._options.terms, losses, strict=True))
        recorded = {f"train/{name}": value for name, value in {**values, **self._gauges()}.items()}
        rate = (progress.examples - self._examples) / max(now - self._seconds, 1e-9)
        recorded |= {"train/skipped_steps": progress.skipped_steps} if progress.skipped_steps else {}
        self.journal.append(progress.step, {"examples": progress.examples, **recorded, "train/examples_per_second": rate})
        if self._bar is not None:
            shown = {term.removesuffix("/loss"): f"{loss:.4f}" for term, loss in values.items()}
            self._bar.set_postfix({**shown, "rows/s": f"{rate:,.0f}"}, refresh=False)
        self._sums = {name: torch.zeros_like(sums) for name, sums in self._sums.items()}
        self._seconds, self._examples = now, progress.examples

    @staticmethod
    def _means(losses: Tensor, weights: Tensor) -> list[float]:
        means: list[float] = (losses / weights).tolist()
        return means


def _unwritten(what: str, progress: Progress, error: OSError) -> TrainingError:
    fix = "make room; the same command goes on from the checkpoint before it"
    return TrainingError(f"step {progress.step}: the {what} cannot be written ({error}). Fix: {fix}.")
