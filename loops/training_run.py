"""Where a training's numbers and checkpoints go: the journal, the checkpoints, the progress bar."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from mlenv.batch import Position
from mlenv.config import CONFIG_FILE, MONITORS
from mlenv.datasets.division import Division
from mlenv.errors import CheckpointError, StoppedError, TrainingError
from mlenv.loops.checkpoint import (
    Retention,
    checkpoint_name,
    link_checkpoint,
    list_checkpoints,
    load_tensors,
    newest_checkpoint,
    save_checkpoint,
    together,
)
from mlenv.loops.checkpoint_store import CheckpointStore, StoreError
from mlenv.loops.checkpoint_writer import CheckpointWriter, Outcome
from mlenv.loops.fit import Progress
from mlenv.loops.journal import JOURNAL_FILE, Journal, SilentJournal
from mlenv.loops.ranks import all_ranks, any_rank, is_main, rank, summed, world_size
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
    retention: Retention
    """Of the checkpoints that a training goes on from; the best models that those know of stay with them."""
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
    division: Division = Division()
    """How the training rows are divided over the ranks."""
    seed: int = 0
    """Of the random generators of ranks that there were not before."""
    hang_timeout_seconds: float = 0
    """Longest time between two steps; 0 waits for ever."""


class UnseenLossError(TrainingError):
    """A loss that is no number or too large was only found when it was recorded, after the model had learned from it."""


class TrainingRun:
    """Keeps a run in its output folder.

    Args:
        output: folder of the run.
        find: gives the newest good checkpoint; None where there is none.
        state: gives all tensors of model and optimizers; they are saved as they are, and loaded in place.
        begin: prepares a model that starts from nothing, such as its normalization.
        check: refuses the config of a checkpoint that the training cannot continue from.
        started: is told when the training begins or continues, and nothing can refuse it any more.
        validate: measures the model on held-out rows: ``task/metric`` to value.
        gauges: what else to record of the training, by name; asked for when the losses are recorded.
        signals: those that ask the process to end; held while steps are trained.
        store: where checkpoints are copied to; None for nowhere.
        on_evaluation: is told of the step and the metrics of every evaluation before the last step; what it raises ends the training.
    """

    def __init__(
        self,
        output: Path,
        options: RunOptions,
        *,
        find: Callable[[], Path | None],
        state: Callable[[], dict[str, Any]],
        begin: Callable[[], None],
        check: Callable[[Path, str], None],
        started: Callable[[], None],
        validate: Callable[[], Mapping[str, float]],
        gauges: Callable[[], Mapping[str, float]],
        signals: StopSignals,
        store: CheckpointStore | None = None,
        on_evaluation: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.journal: Journal | SilentJournal = Journal(output / JOURNAL_FILE) if is_main() else SilentJournal()
        self._checkpoints, self._best, self._options = output / CHECKPOINT_FOLDER, output / BEST_FOLDER, options
        self._find = find
        self._state, self._begin, self._check, self._started = state, begin, check, started
        self._validate, self._gauges, self._signals, self._store = validate, gauges, signals, store
        self._saved_step, self._is_disk_full, self._is_uncopied = 0, False, False
        self._writer = CheckpointWriter()
        self._newest_best: Progress | None = None
        self._on_evaluation = on_evaluation
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
        checkpoint = self._find()
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
            self._writer.look()
        if self._bar is not None:
            self._bar.update()
        if self._watchdog is not None:
            self._watchdog.beat()

    def evaluate(self, progress: Progress) -> Progress:
        """Writes the metrics of the validation window, and keeps the model when its monitor is the best so far.

        Raises:
            TrainingError: the monitor is no number, or the best model before cannot be written: this one cannot take its place.
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
                self._write(self._best, progress, Retention(), partial(self._best_is_written, progress))
        if self._on_evaluation is not None and progress.step < self._options.total_steps:
            self._on_evaluation(progress.step, metrics)
        self._seconds += time.perf_counter() - started
        return progress

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint while the training goes on. A full disk costs the checkpoint, not the training: the ones before it stay.

        Raises:
            TrainingError: the best model before cannot be written.
        """
        self._save(progress, partial(self._checkpoint_is_written, progress))

    @property
    def is_written(self) -> bool:
        """Whether this process is writing nothing at the moment."""
        return self._writer.is_idle

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            TrainingError: the best model cannot be written: a later one cannot take its place.
        """
        self._writer.wait()

    def finish(self, progress: Progress) -> None:
        """Writes the last checkpoint, unless it is there.

        Raises:
            StoppedError: the process was asked to end.
            TrainingError: the checkpoint cannot be written or copied.
        """
        self.wait()
        if progress.step > self._saved_step:
            self._save(progress, partial(self._last_is_written, progress))
            self.wait()
        self.copy()
        if self._watchdog is not None:
            self._watchdog.close()
        self._signals.release()
        if any_rank(bool(self._signals.received)):
            raise StoppedError(f"{self._signals.received or 'a signal to another process'} after step {progress.step}")

    def _save(self, progress: Progress, outcome: Outcome) -> None:
        self._write(self._checkpoints, progress, self._options.retention, outcome)

    def _write(self, folder: Path, progress: Progress, retention: Retention, outcome: Outcome) -> None:
        """Copies all that belongs in a checkpoint, and has it written. What was logged before it is on the disk first."""
        self._check_finite(progress, summed(self._sums["losses"]))
        unwritten: OSError | None = None
        try:
            self.journal.sync()
        except OSError as error:
            unwritten = error
        if any_rank(unwritten is not None):
            self.wait()
            outcome(unwritten or OSError("the journal cannot be written"))
            return
        if folder != self._best and self._newest_best == progress:  # the files of the best model are those of the checkpoint
            write = partial(link_checkpoint, self._best / checkpoint_name(progress.step), folder, retention)
        else:
            self.wait()
            tensors = self._writer.copied({**self._state(), **random_tensors(), **self._own_sums()})
            record = dataclasses.asdict(progress) | {"position": all_ranks(dataclasses.astuple(progress.position))}
            record |= {"division": dataclasses.asdict(self._options.division), "fingerprints": dict(self._options.fingerprints)}
            documents = {
                PROGRESS: json.dumps(record, indent=2),
                CONFIG: self._options.config,
            }
            write = partial(save_checkpoint, folder, progress.step, tensors, documents, retention)
            self._newest_best = progress if folder == self._best else self._newest_best

        def write_and_prune(group: ProcessGroup | None) -> None:
            write(group)
            together(self._prune_best, group)
            self._copy(group)

        self._writer.begin(write_and_prune, outcome)

    def _checkpoint_is_written(self, progress: Progress, failure: OSError | None) -> None:
        if failure is None or isinstance(failure, StoreError):
            self._saved_step, self._is_disk_full = progress.step, False
            self._tell_uncopied(progress, failure)
        elif not self._is_disk_full:
            logger.warning(
                "step %d: the checkpoint cannot be written (%s). The training goes on; a kill would take it back to step %d.",
                progress.step,
                failure,
                self._saved_step,
            )
            self._is_disk_full = True

    def _best_is_written(self, progress: Progress, failure: OSError | None) -> None:
        if failure is None or isinstance(failure, StoreError):
            self._tell_uncopied(progress, failure)
        else:
            self._newest_best = None
            raise _unwritten("best model", progress, failure) from failure

    def _tell_uncopied(self, progress: Progress, failure: StoreError | None) -> None:
        if failure is not None and not self._is_uncopied:
            logger.warning(
                "step %d: the checkpoint cannot be copied (%s). It is on the disk; the next one brings it along.", progress.step, failure
            )
        self._is_uncopied = failure is not None

    def _last_is_written(self, progress: Progress, failure: OSError | None) -> None:
        if failure is not None and not isinstance(failure, StoreError):
            raise _unwritten("last checkpoint", progress, failure) from failure
        self._saved_step = progress.step

    def _own_sums(self) -> dict[str, Tensor]:
        return {of_rank(f"run.{name}"): sums.cpu() for name, sums in self._sums.items()}

    def _prune_best(self) -> None:
        if is_main():
            for name in outdated_best(_names(self._best), _names(self._checkpoints)):
                shutil.rmtree(self._best / name)

    def copy(self) -> None:
        """Has the same checkpoints at the URL as on the disk, documents that were added to one too.

        Raises:
            TrainingError: that cannot be.
        """
        try:
            self._copy(None)
        except StoreError as error:
            fix = "see to the connection and to the rights there; the same command copies what is missing"
            raise TrainingError(f"the checkpoints cannot be copied ({error}). Fix: {fix}.") from error

    def _copy(self, group: ProcessGroup | None) -> None:
        failure: StoreError | None = None
        if self._store is None:
            return
        if is_main():
            try:
                self._copy_to(self._store)
            except StoreError as error:
                failure = error
        if any_rank(failure is not None, group):
            raise failure or StoreError(f"{self._store.url}: rank 0 could not write there")

    def _copy_to(self, store: CheckpointStore) -> None:
        for folder in (self._best, self._checkpoints):  # a checkpoint that is there has its best model there
            store.put(folder)
        checkpoints = store.names(CHECKPOINT_FOLDER)
        outdated = self._options.retention.outdated(checkpoints)
        store.remove(CHECKPOINT_FOLDER, outdated)
        store.remove(BEST_FOLDER, outdated_best(store.names(BEST_FOLDER), sorted({*checkpoints} - {*outdated})))

    def _forget_best(self, after: str) -> None:
        """Removes the best models of steps that a killed training has lost."""
        for name in (name for name in _names(self._best) if name > after):
            shutil.rmtree(self._best / name)
        if self._store is not None:
            self._store.remove(BEST_FOLDER, [name for name in self._store.names(BEST_FOLDER) if name > after])

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
        """Waits for what is being written; ends the progress bar and the watchdog."""
        self._writer.close()
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
        record.pop("division", None)  # whoever asked to find the checkpoint has read it
        if len(positions) != world_size():
            self._load_from_others(checkpoint, len(positions), record["step"])
            return Progress(**record, position=self._options.division.start)
        random, sums = random_tensors(), self._own_sums()
        load_tensors(checkpoint, {**self._state(), **random, **sums})
        set_random_tensors(random)
        self._sums = {name: sums[of_rank(f"run.{name}")] for name in self._sums}
        return Progress(**record, position=Position(*positions[rank()]))

    def _load_from_others(self, checkpoint: Path, num_ranks: int, step: int) -> None:
        """Goes on from a checkpoint of another number of ranks: the sums of all are added up, and the random generators begin anew."""
        sums = {
            of_rank(f"run.{name}", number): torch.zeros_like(own, device="cpu")
            for number in range(num_ranks)
            for name, own in self._sums.items()
        }
        load_tensors(checkpoint, {**self._state(), **sums})
        for name, own in self._sums.items():
            total = torch.stack([sums[of_rank(f"run.{name}", number)] for number in range(num_ranks)]).sum(0)
            self._sums[name] = total if is_main() else torch.zeros_like(own)
        torch.manual_seed(int(np.random.SeedSequence([self._options.seed, step, rank()]).generate_state(1, np.uint64)[0]) >> 1)
        logger.info("the training had %d processes until step %d, and has %d now", num_ranks, step, world_size())

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


def outdated_best(best: Sequence[str], starts: Sequence[str]) -> list[str]:
    """All best models but the best of all, and the best one as of each checkpoint that a killed training may go on from.

    Args:
        best: names of the best models so far, oldest first.
        starts: names of the checkpoints.
    """
    needed = {max((name for name in best if name <= start), default=None) for start in starts}
    return [name for name in best[:-1] if name not in needed]


def _names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def newest_to_go_on_from(output: Path, store: CheckpointStore | None, check: Callable[[Path, str], None]) -> Path | None:
    """The newest good checkpoint on the disk; from the store, with its best model, where that has a newer one.

    Args:
        output: folder of the run.
        check: refuses the config of a checkpoint, before anything is copied.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    checkpoints = output / CHECKPOINT_FOLDER
    if store is None:
        return newest_checkpoint(checkpoints)
    newest, damage = None, None
    try:
        newest = newest_checkpoint(checkpoints)
    except CheckpointError as error:  # all that are here: another one may be whole there
        damage = error
    after = "" if newest is None else newest.name
    newer = [name for name in store.names(CHECKPOINT_FOLDER) if name > after]
    if newer:
        check(checkpoints / newer[-1], store.read(CHECKPOINT_FOLDER, newer[-1], CONFIG))
        try:
            newest = store.fetch_newest(checkpoints, newer)
        except CheckpointError as error:
            damage = error
    if newest is None and damage is not None:
        raise damage
    if newest is not None and newest.name > after:
        store.fetch_newest(output / BEST_FOLDER, [name for name in store.names(BEST_FOLDER) if name <= newest.name][-1:])
    return newest


def _unwritten(what: str, progress: Progress, error: OSError) -> TrainingError:
    fix = "make room; the same command goes on from the checkpoint before it"
    return TrainingError(f"step {progress.step}: the {what} cannot be written ({error}). Fix: {fix}.")
