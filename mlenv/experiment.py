"""Everything that a config stands for, built and ready: model, step, run, sources."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, get_args

import torch
import torch.distributed
from torch import nn

from mlenv.batch import Batch, Extra, Position, example_batch
from mlenv.composition import leaves, to_plain, to_yaml
from mlenv.config import BALANCES, CALIBRATORS, ExperimentConfig
from mlenv.datasets.division import Division, divide_anew, division_from
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.errors import CheckpointError, ConfigError
from mlenv.fabric import make_fabric
from mlenv.kinds import kind_of
from mlenv.loops.bad_step import bad_step_folder, save_bad_step
from mlenv.loops.calibration import CALIBRATORS_FILE, Calibrator, calibrators_from_json, calibrators_to_json, fit_calibrators
from mlenv.loops.checkpoint import Retention, add_document, list_checkpoints, load_tensors, read_document, verify
from mlenv.loops.checkpoint_store import CheckpointStore
from mlenv.loops.compilation import COMPILATION_FILE, Compilation, compile_dense_part
from mlenv.loops.evaluate import evaluate, score
from mlenv.loops.fit import Progress
from mlenv.loops.guarded_step import GuardedStep
from mlenv.loops.learning_rate import LearningRates, schedule_of
from mlenv.loops.optimizers import build_table_optimizers, dense_parameters, options_of_tables
from mlenv.loops.ranks import Shares, all_ranks, from_main, is_main, rank, share, wait_for_all, world_size
from mlenv.loops.read_ahead import ReadAheadStep
from mlenv.loops.sharding import fill_tables, fuse_optimizers
from mlenv.loops.step_meter import StepMeter, peak_tflops
from mlenv.loops.step_profile import PROFILE_FOLDER, WARM_UP_STEPS, ProfiledStep, StepProfile
from mlenv.loops.step_statistics import step_statistics
from mlenv.loops.stop_signals import StopSignals
from mlenv.loops.strategy import TorchRecStrategy
from mlenv.loops.table_memory import TablePlacement, check_memory, free_bytes, replicated
from mlenv.loops.thread_budget import available_cores, compute_threads
from mlenv.loops.train_step import EagerStep, TrainStep
from mlenv.loops.training_run import BEST_FOLDER, CHECKPOINT_FOLDER, CONFIG, PROGRESS, RunOptions, TrainingRun, newest_to_go_on_from
from mlenv.loops.training_state import changing_buffers, model_tensors, optimizer_tensors, parameter_names, random_tensors
from mlenv.loops.weight_average import WeightAverage
from mlenv.modules import ENGINES, NumericNormalization, Objective, gate_gauges
from mlenv.modules.distillation import Teach
from mlenv.pages.page import write_whole
from mlenv.pages.profile_page import PROFILE_PAGE, limit_of, render_profile
from mlenv.records.dataset_record import DATASET_FILE, DatasetRecord, check_same_content, mlflow_inputs, read_dataset_record, record_dataset
from mlenv.records.tracking import MlflowTracker, run_tags
from mlenv.resume import check_resumable, check_schema
from mlenv.run_folder import occupy, write_config
from mlenv.teacher import Teacher, teacher_of
from mlenv.warm_start import OBJECTIVE_STATE, WARM_START, Difference, WarmStart

logger = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

NORMALIZATION_ROWS = 262_144
"""Training rows that means and standard deviations are fitted on."""

NAMED_FACTS = 25
"""Row groups that were passed over, and findings about the data, that the facts of a run name; the log has all."""

JOINS = "joins.json"
"""What the joins of a training found, by window."""

SHARDING = "sharding.json"
"""Where each table lies, what of it on which rank, with how many bytes."""


class Experiment:
    """Builds what a config describes; leave it as a context, so that its locks and threads end with it.

    Args:
        sees_every_loss: whether each step looks at its loss before the model learns from it. None does where that waits for no device.
        on_evaluation: is told of the step and the metrics of every evaluation before the last step; ends the training by EarlyStopError.
        parent: output folder of what the training is a trial of; its MLflow run is nested under the one of that folder.

    Raises:
        ConfigError: the output folder has no parent; nothing is written before the first step of a training.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        sees_every_loss: bool | None = None,
        *,
        on_evaluation: Callable[[int, Mapping[str, float]], None] | None = None,
        parent: Path | None = None,
    ) -> None:
        self.config, self.schema, self.output = config, config.schema, Path(config.output)
        self._on_evaluation, self._parent = on_evaluation, parent
        if not self.output.parent.is_dir():
            fix = f"mkdir -p '{self.output.parent}', or set output to a folder elsewhere"
            raise ConfigError("output", expected="a folder whose parent exists", received=str(self.output), fix=fix)
        self._lock: IO[str] | None = None
        self._tracker: MlflowTracker | None = None
        self._signals = StopSignals()
        if config.loop.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("loop.device", expected="a device of this machine", received="cuda", fix="set it to auto or cpu")
        was_in_group = torch.distributed.is_initialized()
        self.fabric = make_fabric(config)
        self.fabric.launch()
        self._started_process_group = torch.distributed.is_initialized() and not was_in_group
        self._sees_every_loss = sees_loss_for_free(self.fabric.device) if sees_every_loss is None else sees_every_loss
        self._sources: dict[Split, ParquetSource] = {}
        self._loaded: Path | None = None
        self._profiled: ProfiledStep | None = None
        self._threads_before = torch.get_num_threads()
        if "OMP_NUM_THREADS" not in os.environ:
            processes, decoding = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), config.data.workers.local_threads
            torch.set_num_threads(compute_threads(available_cores(), num_processes=processes, decode_threads=decoding))
        self._taken: Difference | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The model, as it is trained: on its device, its TorchRec tables sharded."""
        config = self.config
        strategy, device = self.fabric.strategy, self.fabric.device
        if config.embeddings.engine == "torch":
            check_memory(self.placements, free_bytes(device))
        embeddings = ENGINES[config.embeddings.engine](self.schema, config.embeddings, config.seed)
        torch.manual_seed(config.seed)
        model = config.model.build(self.schema, embeddings)
        if config.embeddings.engine == "torchrec":
            fuse_optimizers(model, config.embeddings)
            model = strategy.setup_module(model)
            fill_tables(model, config.embeddings, self.schema.table_dims, config.seed)
        else:
            model = strategy.setup_module(model.to(device))
        torch.manual_seed(config.seed + rank())  # building may draw more or fewer numbers; training starts from the same
        return model

    @property
    def placements(self) -> dict[str, TablePlacement]:
        """Where each table lies."""
        if self.config.embeddings.engine == "torch":
            return replicated(self.schema.tables, self.config.embeddings)
        _ = self.model
        assert isinstance(self.fabric.strategy, TorchRecStrategy)
        return self.fabric.strategy.placements

    @cached_property
    def teach(self) -> Teach | None:
        """The teacher, loaded; None without one."""
        return teacher_of(self.config.objective.distillation, self.schema, self.fabric.device, self.config.tracking.uri)

    @cached_property
    def warm_start(self) -> WarmStart | None:
        """The checkpoint that the training begins with; None without one."""
        config = self.config.warm_start
        return None if config is None else WarmStart(config, self.schema, self.config.tracking.uri)

    @cached_property
    def objective(self) -> Objective:
        """What the training lowers; its teacher, if it has one, is loaded with it."""
        config, device = self.config.objective, self.fabric.device
        if world_size() > 1 and config.balance is not None and kind_of(config.balance, BALANCES) in ("grad_norm", "pcgrad"):
            # They run backward once for each task, and gradients are averaged over the processes once a step.
            received = f"{kind_of(config.balance, BALANCES)} with {world_size()} processes"
            raise ConfigError("objective.balance", expected="uncertainty or none with several processes", received=received)
        probe = example_batch(self.schema).to(device)
        model, tasks = self.model, self.schema.tasks
        with torch.random.fork_rng():  # dropout goes on with the same numbers, whatever the objective draws
            torch.manual_seed(self.config.seed)
            return Objective(config, tasks, model, teach=self.teach, num_steps=self.total_steps, probe=probe).to(device)

    @cached_property
    def compilation(self) -> Compilation | None:
        """What came of compiling the model behind its embeddings, which is done here; None without ``loop.compile``."""
        mode = self.config.loop.compile
        if mode == "none":
            return None
        if mode == "cuda_graphs" and self.fabric.device.type != "cuda":
            fix = "set it to kernels, or loop.device to cuda"
            raise ConfigError("loop.compile", expected="none or kernels on a CPU", received=mode, fix=fix)
        probe = example_batch(self.schema, self.config.data.batch_size).to(self.fabric.device)
        return compile_dense_part(self.model, probe, mode, self.fabric.autocast)

    @cached_property
    def step(self) -> StepMeter:
        """One step of training."""
        _ = self.compilation
        whole_tables = [table for table, options in options_of_tables(self.model, self.config.embeddings) if options.optimizer == "adam"]
        clip = [*self._dense_parameters, *whole_tables], self.config.optimizer.gradient_clip_norm
        rates, schedule = None, schedule_of(self.config.loop, self.total_steps)
        if schedule is not None:
            rates = LearningRates(self.optimizers, getattr(self.model, "fused_optimizer", None), schedule)
        accumulated = self.config.loop.accumulate_batches
        filler = example_batch(self.schema)  # two rows: TorchRec's sequences take no fewer than one, batch normalization than two
        step: TrainStep = EagerStep(
            self.fabric, self.model, self.optimizers, self.objective, clip, rates, self.shares, filler, self.average, accumulated
        )
        if self._sees_every_loss:
            step = GuardedStep(step, self.model, self.objective, self.optimizers, self.config.loop, self._keep_bad_step, filler)
        reads_ahead = self.config.loop.read_ahead
        if reads_ahead or (reads_ahead is None and self.fabric.device.type == "cuda"):
            step = ReadAheadStep(step, self.model, self.objective, self.fabric.device, filler, self.total_steps, accumulated)
        if looked_at := self.config.loop.profile_steps:
            if self.total_steps < WARM_UP_STEPS + looked_at:
                expected = f"at most {max(self.total_steps - WARM_UP_STEPS, 0)}, so that the training is long enough"
                raise ConfigError("loop.profile_steps", expected=expected, received=looked_at)
            self._profiled = ProfiledStep(step, looked_at, self.fabric.device, self.output / PROFILE_FOLDER, self._keep_profile)
            step = self._profiled
        peak = peak_tflops(self.fabric.device, self.config.loop.precision, self.config.loop.peak_tflops)
        return StepMeter(step, self.model, self.fabric.device, filler, peak)

    @cached_property
    def shares(self) -> Shares:
        """How the training rows are divided over the processes and their steps."""
        source = self.source("train")
        source.division = self.division
        if is_main() and len(source.row_groups) < world_size():
            fix = "write smaller row groups, or train with fewer processes"
            logger.warning(
                "data.train: %d row groups for %d processes: the others train on empty batches. Fix: %s.",
                len(source.row_groups),
                world_size(),
                fix,
            )
        rows = tuple(own for (own,) in all_ranks((source.num_own_rows,)))
        return Shares(rows, self.config.data.batch_size * self.config.loop.accumulate_batches, self.division.step)

    @cached_property
    def division(self) -> Division:
        """How the training rows are divided: anew where the checkpoint to go on from is of another number of processes."""
        if self._newest is None:
            return Division()
        record = json.loads((self._newest / PROGRESS).read_text())
        before, positions = division_from(record.get("division")), [Position(*position) for position in record["position"]]
        if len(positions) == world_size():
            return before
        return divide_anew(before, positions, record["step"], world_size(), self.source("train").rows_of_windows)

    @cached_property
    def _newest(self) -> Path | None:
        """The checkpoint that the training goes on from; only rank 0 reads all of it, to verify it."""
        found = None
        if is_main() and (self.store is not None or self.output.exists()):
            self._occupy()
            found = newest_to_go_on_from(self.output, self.store, self._check_resumable)
        path = from_main(str(found or ""))
        return Path(path) if path else None

    @cached_property
    def average(self) -> WeightAverage | None:
        """The average of the model's dense parameters; None without ``loop.ema_decay``."""
        if not self.config.loop.ema_decay:
            return None
        averaged = {id(parameter) for parameter in dense_parameters(self.model)}
        named = ((name.removeprefix("module."), parameter) for name, parameter in self.model.named_parameters())
        parameters = {name: parameter for name, parameter in named if id(parameter) in averaged}
        return WeightAverage(parameters, self.config.loop.ema_decay)

    @cached_property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        available, wanted = self.shares.num_steps, self.config.loop.max_steps
        return min(available, wanted) if wanted else available

    @cached_property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """What updates the model after a backward pass; TorchRec's tables update themselves during it."""
        tables = options_of_tables(self.model, self.config.embeddings)
        return [self.config.optimizer.build(self._dense_parameters), *build_table_optimizers(tables)]

    @cached_property
    def store(self) -> CheckpointStore | None:
        """Where checkpoints are copied to; None without ``loop.checkpoint_url``."""
        return CheckpointStore(self.config.loop.checkpoint_url) if self.config.loop.checkpoint_url else None

    @cached_property
    def run(self) -> TrainingRun:
        """The run in the output folder, which is made and locked, and tracked in MLflow."""
        source, loop = self.source("train"), self.config.loop
        if loop.monitor and self.total_steps < loop.evaluate_every_steps:
            expected = f"at most the {self.total_steps} steps of the training, so that loop.monitor is measured"
            raise ConfigError("loop.evaluate_every_steps", expected=expected, received=loop.evaluate_every_steps)
        if self.warm_start is not None:
            self.warm_start.compare(self._model_tensors())
        if is_main() and self.store is not None:
            self.store.check()
        if is_main():
            self._occupy()
        wait_for_all()
        options = RunOptions(
            terms=self.objective.terms,
            log_every_steps=loop.log_every_steps,
            retention=Retention(newest=loop.keep_checkpoints, every_steps=loop.keep_every_steps),
            monitor=loop.monitor,
            total_steps=self.total_steps,
            config=to_yaml(self.config),
            fingerprints={"training data": source.fingerprint, **self._teacher_fingerprint, **self._warm_start_fingerprint},
            max_loss=loop.max_loss,
            hang_timeout_seconds=loop.hang_timeout_seconds,
            division=self.division,
            seed=self.config.seed,
        )
        return TrainingRun(
            self.output,
            options,
            find=lambda: self._newest,
            state=self._tensors,
            begin=self._begin,
            check=self._check_resumable,
            started=self._record_start,
            validate=self._validate,
            gauges=self._gauges,
            signals=self._signals,
            store=self.store,
            on_evaluation=self._on_evaluation,
        )

    def source(self, split: Split) -> ParquetSource:
        """Rows of a window of the config; its columns are checked when it is first asked for.

        Raises:
            Problems, DataError: see ParquetSource.
        """
        if split not in self._sources:
            self._sources[split] = self._open_source(split)
        return self._sources[split]

    @cached_property
    def dataset(self) -> DatasetRecord:
        """What all windows of the config hold, file by file; files that an earlier training here recorded are not read again."""
        splits: list[Split] = [split for split in SPLITS if getattr(self.config.data, split) is not None]
        sources = {split: self.source(split) for split in splits}
        return record_dataset(self.config.data, sources, self.schema, self._known_dataset)

    def load(self) -> Path:
        """Loads a checkpoint into the model, for evaluation, and returns it: the best with ``loop.monitor``, else the newest. With
        ``loop.ema_decay`` the model has the averaged weights then.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to another schema or model.
        """
        folder = self.output / (BEST_FOLDER if self.config.loop.monitor else CHECKPOINT_FOLDER)
        if is_main() and self.store is not None and not list_checkpoints(folder):
            self.store.fetch_newest(folder, self.store.names(folder.name))
        wait_for_all()
        checkpoints = list_checkpoints(folder)
        if not checkpoints:
            raise CheckpointError(str(self.output), expected="a checkpoint", received="none", fix="train first: mlenv train CONFIG")
        verify(checkpoints[-1])
        check_schema(checkpoints[-1], (checkpoints[-1] / CONFIG).read_text(), self.schema)
        load_tensors(checkpoints[-1], model_tensors(self.model))
        self._loaded = checkpoints[-1]
        self.__dict__.pop("calibrators", None)  # those of another model
        return checkpoints[-1]

    @cached_property
    def calibrators(self) -> dict[str, Calibrator]:
        """By task: those that were just fitted, or of the checkpoint that was loaded; what the config says now does not count.

        Raises:
            CheckpointError: a calibrator's segment column is gone from the schema, or its class from the config.
        """
        return {} if self._loaded is None else self._read_calibrators(self._loaded)

    def calibrate(self, checkpoint: Path) -> None:
        """Fits the calibrators of the config to the model as it is, and saves them in the checkpoint that holds it."""
        if not self.config.calibration and read_document(checkpoint, CALIBRATORS_FILE) is None:
            return
        needs_labels = any(config.needs_labels for config in self.config.calibration.values())
        scored = score(self.model, self.source("validation")) if needs_labels else ()
        self.calibrators = fit_calibrators(self.config.calibration, self.schema.tasks, scored)
        if is_main():
            add_document(checkpoint, CALIBRATORS_FILE, calibrators_to_json(self.calibrators))

    def keep(self, path: Path, folder: str = "") -> None:
        """Adds a file or a folder to the tracked run."""
        if self._tracker is not None:
            self._tracker.log_artifact(path, folder)

    @property
    def _teacher_fingerprint(self) -> dict[str, str]:
        return {"teacher": self.teach.fingerprint} if isinstance(self.teach, Teacher) else {}

    @property
    def _warm_start_fingerprint(self) -> dict[str, str]:
        return {} if self.warm_start is None else {"warm start": self.warm_start.fingerprint}

    @property
    def _known_dataset(self) -> DatasetRecord | None:
        """What an earlier training here wrote of its data."""
        file = self.output / DATASET_FILE
        return read_dataset_record(file) if file.exists() else None

    @property
    def _extras(self) -> tuple[Extra, ...]:
        """What the objective reads of the training rows beside features and labels."""
        objective = self.config.objective
        wanted: dict[Extra, bool] = {"requests": objective.reads_requests, "teacher": objective.reads_teacher_columns}
        return tuple(extra for extra, is_wanted in wanted.items() if is_wanted)

    @property
    def facts(self) -> dict[str, str]:
        """What identifies this training: windows, fingerprints, revision, versions."""
        windows = {f"{name} window": str(window) for name in SPLITS if (window := getattr(self.config.data, name)) is not None}
        prints = {"schema fingerprint": self.schema.fingerprint}
        prints |= {f"{split} data fingerprint": source.fingerprint for split, source in self._sources.items()}
        for split, source in self._sources.items():
            for name, lines in (("passed over", source.skipped), ("findings", source.findings)):
                more = [f"and {len(lines) - NAMED_FACTS} more"] if len(lines) > NAMED_FACTS else []
                prints |= {f"{split} data {name}": "; ".join([*lines[:NAMED_FACTS], *more])} if lines else {}
        if "teach" in self.__dict__:
            prints |= {f"{name} fingerprint": text for name, text in self._teacher_fingerprint.items()}
        if "warm_start" in self.__dict__:
            prints |= {f"{name} fingerprint": text for name, text in self._warm_start_fingerprint.items()}
        prints |= {
            f"{split} join {join['table']}": f"{join['match_rate']:.2%} of {join['rows'] - join['unknown']:,} rows find something"
            for split, source in self._sources.items()
            for join in source.joins.values()
        }
        if (compilation := self.__dict__.get("compilation")) is not None:
            prints["compilation"] = str(compilation)
        if "model" in self.__dict__ and world_size() > 1:
            prints["tables"] = "; ".join(f"{table} {placement}" for table, placement in self.placements.items())
        return {**windows, **prints, "device": str(self.fabric.device), **run_tags()}

    @property
    def tracked_as(self) -> str:
        """Where to find the run in MLflow; empty when it is not tracked."""
        if self._tracker is None:
            return ""
        return self._tracker.url or f"run {self._tracker.run_id or 'pending'} of experiment {self.config.tracking.experiment!r}"

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._signals.__exit__(kind, error, trace)
        if self._profiled is not None:
            self._profiled.close()
        torch.set_num_threads(self._threads_before)
        if "run" in self.__dict__:
            self.run.close()
        for source in self._sources.values():
            source.close()
        if self._tracker is not None:
            self._tracker.finish("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")
        if self._lock is not None:
            self._lock.close()
        if self._started_process_group:
            torch.distributed.destroy_process_group()

    def _open_source(self, split: Split, *, is_divided: bool = True) -> ParquetSource:
        """Of the training rows each rank reads its own, unless they are not divided; held-out rows are read by all."""
        data, is_training = self.config.data, split == "train"
        window = getattr(data, split)
        if window is None:
            raise ConfigError(f"data.{split}", expected="a window", received=None, fix=f"set data.{split}.start and end, or path")
        extras: tuple[Extra, ...] = self._extras if is_training else ("metadata",)
        return ParquetSource(
            data,
            window,
            self.schema,
            is_training=is_training,
            shuffle=is_training,
            seed=self.config.seed,
            num_epochs=data.num_epochs if is_training else 1,
            extras=extras,
            rank=rank() if is_training and is_divided else 0,
            world_size=world_size() if is_training and is_divided else 1,
        )

    @cached_property
    def _dense_parameters(self) -> list[nn.Parameter]:
        return [*dense_parameters(self.model), *self.objective.parameters()]

    def _model_tensors(self) -> dict[str, Any]:
        """What a warm start may fill: the weights that are trained, and the optimizers' state of them."""
        state = optimizer_tensors(self.model, parameter_names(self.model, self.objective), self.optimizers)
        return {**model_tensors(self.model), **{name: tensor for name, tensor in state.items() if not name.startswith(OBJECTIVE_STATE)}}

    def _tensors(self) -> dict[str, Any]:
        self._agree_on_buffers()
        objective = {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        names = parameter_names(self.model, self.objective)
        averaged = {} if self.average is None else self.average.tensors()
        return {**model_tensors(self.model), **averaged, **objective, **optimizer_tensors(self.model, names, self.optimizers)}

    def _keep_bad_step(self, progress: Progress, batch: Batch) -> str:
        """Writes a step down that must not be learned from. A disk that has no room for it keeps nobody from going on."""
        folder = bad_step_folder(self.output, progress.step + 1)
        tensors = {**self._tensors(), **random_tensors()}
        record = {**dataclasses.asdict(progress), "total_steps": self.total_steps}
        documents = {PROGRESS: json.dumps(record, indent=2), CONFIG: to_yaml(self.config)}
        statistics = step_statistics(self.model, self.objective, batch.to(self.fabric.device), self.fabric.autocast)
        try:
            save_bad_step(folder, progress.step + 1, tensors, documents, batch, statistics)
        except OSError as error:
            return f"{statistics.origin}; the step could not be kept in {folder} ({error})"
        return f"{statistics.origin}; kept in {folder}, for mlenv.replay"

    def _keep_profile(self, profile: StepProfile) -> None:
        folder = self.output / PROFILE_FOLDER
        write_whole(render_profile(profile, self.config.name), folder / PROFILE_PAGE)
        self.keep(folder)
        logger.info("%s: %s", folder / PROFILE_PAGE, limit_of(profile))

    def _gauges(self) -> dict[str, float]:
        return {**self.objective.gauges(), **gate_gauges(self.model), **self.step.gauges()}

    def _begin(self) -> None:
        """Prepares a model that starts from nothing, or from the weights of another one."""
        self._fit_normalization()
        if self.warm_start is None:
            return
        tensors = self._model_tensors()
        self.warm_start.verify()
        self._taken = self.warm_start.compare(tensors)
        self.warm_start.take(tensors, self._taken)
        if self.average is not None:
            self.average.restart()
        logger.info("warm start from %s: %s", self.warm_start.checkpoint, self._taken)

    def _fit_normalization(self) -> None:
        """Rank 0 reads the rows that a single process would, so that the model is the same on any number of them."""
        batches = -(-NORMALIZATION_ROWS // self.config.data.batch_size)
        source = self.source("train") if world_size() == 1 else self._open_source("train", is_divided=False)
        for module in self.model.modules():
            if isinstance(module, NumericNormalization) and self.schema.num_dense:
                if is_main():
                    reader = source.batches()
                    module.fit(batch.dense for batch, _ in zip(reader, range(batches), strict=False))
                    reader.close()
                share(module.buffers())

    def _agree_on_buffers(self) -> None:
        """What each process has followed by itself, such as the means of a batch normalization, becomes that of the first."""
        share(changing_buffers(self.model, self.objective))

    def _validate(self) -> dict[str, float]:
        self._agree_on_buffers()
        with nullcontext() if self.average is None else self.average.in_place():
            return evaluate(self.model, self.source("validation")).metrics

    def _read_calibrators(self, checkpoint: Path) -> dict[str, Calibrator]:
        configs = self.config.calibration
        text = read_document(checkpoint, CALIBRATORS_FILE)
        calibrators = {} if text is None else calibrators_from_json(text, configs, f"{checkpoint}, {CALIBRATORS_FILE}")
        fitted = {task: calibrator.kind for task, calibrator in calibrators.items()}
        wanted = {task: kind_of(config, CALIBRATORS) for task, config in configs.items()}
        if fitted != wanted:
            fix = "mlenv train with this config fits anew, once the training has ended"
            logger.warning(
                "%s: calibrated with %s, not with the config's %s. Fix: %s.", checkpoint, fitted or "nothing", wanted or "nothing", fix
            )
        for task, calibrator in calibrators.items():
            for column in calibrator.segments.keys() - set(self.schema.segments):
                raise CheckpointError(
                    f"{checkpoint}, calibrator of {task!r}", expected=f"{column!r} in schema.segments", received=list(self.schema.segments)
                )
        return calibrators

    def _check_resumable(self, checkpoint: Path, text: str) -> None:
        check_resumable(self.config, checkpoint, text)
        if known := self._known_dataset:
            check_same_content(known, self.dataset, checkpoint)

    def _occupy(self) -> None:
        self._lock = self._lock or occupy(self.output)

    def _record_start(self) -> None:
        """Writes the config and begins the tracked run, once it is certain that the training goes on."""
        write_whole(self.dataset.to_json(), self.output / DATASET_FILE)
        write_config(self.config)
        placements = {table: dataclasses.asdict(placement) for table, placement in self.placements.items()}
        write_whole(json.dumps(placements, indent=2), self.output / SHARDING)
        if joins := {split: source.joins for split, source in self._sources.items() if source.joins}:
            write_whole(json.dumps(joins, indent=2), self.output / JOINS)
        if self.compilation is not None:
            write_whole(json.dumps(dataclasses.asdict(self.compilation), indent=2), self.output / COMPILATION_FILE)
        if self._taken is not None:
            write_whole(self._taken.to_json(), self.output / WARM_START)
        tracking = self.config.tracking
        if not tracking.enabled:
            return
        self._tracker = MlflowTracker(
            self.output, uri=tracking.uri, experiment=tracking.experiment, run_name=self.config.name, parent=self._parent
        )
        params = {key: str(value) for key, value in leaves(to_plain(self.config)).items() if not key.startswith("schema.")}
        self._tracker.start(params, self.facts)
        self._tracker.log_inputs(mlflow_inputs(self.dataset))
        self.keep(self.output / CONFIG)
        self.keep(self.output / DATASET_FILE)
        for name, is_there in (
            (SHARDING, True),
            (JOINS, bool(joins)),
            (COMPILATION_FILE, self.compilation is not None),
            (WARM_START, self._taken is not None),
        ):
            if is_there:
                self.keep(self.output / name)


def sees_loss_for_free(device: torch.device) -> bool:
    """Whether reading the loss of every step costs nothing: the step is done by then, and no device has to be waited for."""
    return device.type == "cpu"
