"""Everything that a config stands for, built and ready: model, step, run, sources."""

from __future__ import annotations

import fcntl
import json
import logging
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, get_args

import torch
import torch.distributed
from lightning.fabric import Fabric
from omegaconf import OmegaConf
from torch import Tensor, nn

from mlenv.batch import Extra, example_batch
from mlenv.composition import from_plain, to_plain, to_yaml
from mlenv.config import CALIBRATORS, ExperimentConfig
from mlenv.dataset_record import DATASET_FILE, DatasetRecord, check_same_content, mlflow_inputs, read_dataset_record, record_dataset
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.errors import CheckpointError, ConfigError, MlenvError
from mlenv.kinds import kind_of
from mlenv.loops.calibration import CALIBRATORS_FILE, Calibrator, calibrators_from_json, calibrators_to_json, fit_calibrators
from mlenv.loops.checkpoint import add_document, list_checkpoints, load_tensors, read_document, verify
from mlenv.loops.evaluate import evaluate, score
from mlenv.loops.learning_rate import LearningRates, linear_decay, plateau_decay
from mlenv.loops.optimizers import build_adam, build_table_optimizer, dense_parameters, plain_tables
from mlenv.loops.sharding import shard
from mlenv.loops.train_step import EagerStep
from mlenv.loops.training_run import BEST_FOLDER, CHECKPOINT_FOLDER, CONFIG, RunOptions, TrainingRun
from mlenv.loops.training_state import model_tensors, optimizer_tensors, parameter_names
from mlenv.modules import ENGINES, NumericNormalization, Objective, gate_gauges
from mlenv.modules.distillation import Teach
from mlenv.page import write_whole
from mlenv.schema import Schema
from mlenv.teacher import Teacher, teacher_of
from mlenv.tracking import MlflowTracker, run_tags

logger = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

NORMALIZATION_ROWS = 262_144
"""Training rows that means and standard deviations are fitted on."""

NAMED_FACTS = 25
"""Row groups that were passed over, and findings about the data, that the facts of a run name; the log has all."""

_MAY_CHANGE = (
    *("name", "output", "tracking.", "checks.", "calibration.", "data.path", "data.test", "data.workers."),
    *("loop.log_every_steps", "loop.checkpoint_every_steps", "loop.keep_checkpoints", "loop.stop_after_evaluations", "loop.device"),
    "data.content_hash",
)
"""Keys that a resumed training may set anew; any other would make it another model."""

JOINS = "joins.json"
"""What the joins of a training found, by window."""

_HEADER = "# What mlenv composed of defaults, files and overrides.\n"

_LENGTH = ("loop.max_steps", "data.num_epochs")
"""Keys that a resumed training may set anew unless the learning rate follows from them."""

_VALIDATION = ("data.validation", "loop.evaluate_every_steps")
"""Keys that a resumed training may set anew unless the best step is chosen by them."""


class Experiment:
    """Builds what a config describes; leave it as a context, so that its locks and threads end with it.

    Raises:
        ConfigError: the output folder has no parent; nothing is written before the first step of a training.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self.config, self.schema, self.output = config, config.schema, Path(config.output)
        if not self.output.parent.is_dir():
            fix = f"mkdir -p '{self.output.parent}', or set output to a folder elsewhere"
            raise ConfigError("output", expected="a folder whose parent exists", received=str(self.output), fix=fix)
        self._started_process_group = False
        self._lock: IO[str] | None = None
        self._tracker: MlflowTracker | None = None
        if config.loop.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("loop.device", expected="a device of this machine", received="cuda", fix="set it to auto or cpu")
        self.fabric = Fabric(accelerator=config.loop.device, devices=1, precision=config.loop.precision)
        self._sources: dict[Split, ParquetSource] = {}
        self._loaded: Path | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The model, as it is trained: on its device, its TorchRec tables sharded."""
        config = self.config
        embeddings = ENGINES[config.embeddings.engine](self.schema, config.embeddings, config.seed)
        torch.manual_seed(config.seed)
        model = config.model.build(self.schema, embeddings)
        if config.embeddings.engine == "torchrec":
            self._started_process_group = not torch.distributed.is_initialized()
            model = shard(model, config.embeddings, self.fabric.device, config.seed)
        else:
            model = model.to(self.fabric.device)
        torch.manual_seed(config.seed)  # building may draw more or fewer numbers; training starts from the same
        return model

    @cached_property
    def teach(self) -> Teach | None:
        """The teacher, loaded; None without one."""
        return teacher_of(self.config.objective.distillation, self.schema, self.fabric.device, self.config.tracking.uri)

    @cached_property
    def objective(self) -> Objective:
        """What the training lowers; its teacher, if it has one, is loaded with it."""
        config, device = self.config.objective, self.fabric.device
        probe = example_batch(self.schema).to(device)
        model, tasks = self.model, self.schema.tasks
        with torch.random.fork_rng():  # dropout goes on with the same numbers, whatever the objective draws
            torch.manual_seed(self.config.seed)
            return Objective(config, tasks, model, teach=self.teach, num_steps=self.total_steps, probe=probe).to(device)

    @cached_property
    def step(self) -> EagerStep:
        """One step of training."""
        clipped: list[Tensor] = [*self._dense_parameters]
        if self.config.embeddings.optimizer == "adam":
            clipped += plain_tables(self.model)
        clip = clipped, self.config.optimizer.gradient_clip_norm
        decay, rates = self.config.loop.learning_rate_decay, None
        if decay != "none":
            schedule = linear_decay(self.total_steps) if decay == "linear" else plateau_decay
            rates = LearningRates(self.optimizers, getattr(self.model, "fused_optimizer", None), schedule)
        return EagerStep(self.fabric, self.model, self.optimizers, self.objective, clip, rates)

    @cached_property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        available, wanted = self.source("train").num_batches, self.config.loop.max_steps
        return min(available, wanted) if wanted else available

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """What updates the model after a backward pass; TorchRec's tables update themselves during it."""
        return [self._adam] if self._table_optimizer is None else [self._adam, self._table_optimizer]

    @cached_property
    def run(self) -> TrainingRun:
        """The run in the output folder, which is made and locked, and tracked in MLflow."""
        source, loop = self.source("train"), self.config.loop
        if loop.monitor and self.total_steps < loop.evaluate_every_steps:
            expected = f"at most the {self.total_steps} steps of the training, so that loop.monitor is measured"
            raise ConfigError("loop.evaluate_every_steps", expected=expected, received=loop.evaluate_every_steps)
        self._occupy()
        options = RunOptions(
            terms=self.objective.terms,
            log_every_steps=loop.log_every_steps,
            keep_checkpoints=loop.keep_checkpoints,
            monitor=loop.monitor,
            total_steps=self.total_steps,
            config=to_yaml(self.config),
            fingerprints={"training data": source.fingerprint, **self._teacher_fingerprint},
        )
        return TrainingRun(
            self.output,
            options,
            state=self._tensors,
            begin=self._fit_normalization,
            check=self._check_resumable,
            started=self._record_start,
            validate=self._validate,
            gauges=self._gauges,
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
        """Loads a checkpoint into the model, for evaluation, and returns it: the best with ``loop.monitor``, else the newest.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to another schema or model.
        """
        checkpoints = list_checkpoints(self.output / (BEST_FOLDER if self.config.loop.monitor else CHECKPOINT_FOLDER))
        if not checkpoints:
            raise CheckpointError(str(self.output), expected="a checkpoint", received="none", fix="train first: mlenv train CONFIG")
        verify(checkpoints[-1])
        self._check_schema(checkpoints[-1], _plain((checkpoints[-1] / CONFIG).read_text()))
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
        add_document(checkpoint, CALIBRATORS_FILE, calibrators_to_json(self.calibrators))

    def keep(self, path: Path, folder: str = "") -> None:
        """Adds a file or a folder to the tracked run."""
        if self._tracker is not None:
            self._tracker.log_artifact(path, folder)

    @property
    def _teacher_fingerprint(self) -> dict[str, str]:
        return {"teacher": self.teach.fingerprint} if isinstance(self.teach, Teacher) else {}

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
        prints |= {
            f"{split} join {join['table']}": f"{join['match_rate']:.2%} of {join['rows'] - join['unknown']:,} rows find something"
            for split, source in self._sources.items()
            for join in source.joins.values()
        }
        return {**windows, **prints, "device": str(self.fabric.device), **run_tags()}

    @property
    def tracked_as(self) -> str:
        """Where to find the run in MLflow; empty when it is not tracked."""
        if self._tracker is None:
            return ""
        return self._tracker.url or f"run {self._tracker.run_id or 'pending'} of experiment {self.config.tracking.experiment!r}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if "run" in self.__dict__:
            self.run.close()
        for source in self._sources.values():
            source.close()
        if self._tracker is not None:
            self._tracker.finish("FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED")
        if self._lock is not None:
            self._lock.close()
        if self._started_process_group:
            torch.distributed.destroy_process_group()

    def _open_source(self, split: Split) -> ParquetSource:
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
        )

    @cached_property
    def _adam(self) -> torch.optim.Optimizer:
        return build_adam(self._dense_parameters, self.config.optimizer)

    @cached_property
    def _dense_parameters(self) -> list[nn.Parameter]:
        return [*dense_parameters(self.model), *self.objective.parameters()]

    @cached_property
    def _table_optimizer(self) -> torch.optim.Optimizer | None:
        tables = plain_tables(self.model)
        return build_table_optimizer(tables, self.config.embeddings) if tables else None

    def _tensors(self) -> dict[str, Any]:
        objective = {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        names = parameter_names(self.model, self.objective)
        return {**model_tensors(self.model), **objective, **optimizer_tensors(self.model, names, self.optimizers)}

    def _gauges(self) -> dict[str, float]:
        return {**self.objective.gauges(), **gate_gauges(self.model)}

    def _fit_normalization(self) -> None:
        batches = -(-NORMALIZATION_ROWS // self.config.data.batch_size)
        for module in self.model.modules():
            if isinstance(module, NumericNormalization) and self.schema.num_dense:
                reader = self.source("train").batches()
                module.fit(batch.dense for batch, _ in zip(reader, range(batches), strict=False))
                reader.close()

    def _validate(self) -> dict[str, float]:
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

    def _check_schema(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        differences = from_plain(saved["schema"], Schema, str(checkpoint)).differences(self.schema)
        if differences:
            fix = "use the config it was trained with, or train in another output folder"
            raise CheckpointError(
                f"{checkpoint}, schema", expected="the schema it was trained with", received="; ".join(differences), fix=fix
            )

    def _check_resumable(self, checkpoint: Path, text: str) -> None:
        saved = _plain(text)
        self._check_schema(checkpoint, saved)
        before, now = _flat(saved), _flat(to_plain(self.config))
        loop, taught = self.config.loop, self.config.objective.distillation
        follows_length = loop.learning_rate_decay == "linear" or (taught is not None and taught.final_weight is not None)
        may_change = _MAY_CHANGE + (() if follows_length else _LENGTH) + (() if loop.monitor else _VALIDATION)
        changed = [
            f"{key}: {before.get(key)!r} became {now.get(key)!r}"
            for key in {**before, **now}
            if before.get(key) != now.get(key) and not key.startswith(("schema.", *may_change))
        ]
        if changed:
            fix = "put them back, or train in another output folder"
            raise CheckpointError(f"{checkpoint}, config", expected="the values it was trained with", received="; ".join(changed), fix=fix)
        if known := self._known_dataset:
            check_same_content(known, self.dataset, checkpoint)

    def _occupy(self) -> None:
        """Makes the output folder and keeps a second training out of it."""
        written = self.output / CONFIG
        if (self.output.exists() and not self.output.is_dir()) or (written.exists() and not written.read_text().startswith(_HEADER)):
            received = f"a file {CONFIG} of your own" if written.exists() else "a file"
            raise ConfigError("output", expected="a folder for the run alone", received=received, fix="set output to another folder")
        self.output.mkdir(exist_ok=True)
        self._lock = (self.output / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MlenvError(
                f"{self.output}: another training is writing here. Fix: wait for it, or set output to another folder."
            ) from error

    def _record_start(self) -> None:
        """Writes the config and begins the tracked run, once it is certain that the training goes on."""
        write_whole(self.dataset.to_json(), self.output / DATASET_FILE)
        temporary = self.output / f".{CONFIG}.part"
        temporary.write_text(_HEADER + to_yaml(self.config))
        temporary.replace(self.output / CONFIG)
        if joins := {split: source.joins for split, source in self._sources.items() if source.joins}:
            (self.output / JOINS).write_text(json.dumps(joins, indent=2))
        tracking = self.config.tracking
        if not tracking.enabled:
            return
        self._tracker = MlflowTracker(self.output, uri=tracking.uri, experiment=tracking.experiment, run_name=self.config.name)
        params = {key: str(value) for key, value in _flat(to_plain(self.config)).items() if not key.startswith("schema.")}
        self._tracker.start(params, self.facts)
        self._tracker.log_inputs(mlflow_inputs(self.dataset))
        self.keep(self.output / CONFIG)
        self.keep(self.output / DATASET_FILE)
        if joins:
            self.keep(self.output / JOINS)


def _plain(text: str) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    if not isinstance(node, dict):
        return {key: node}
    return {name: value for part, entry in node.items() for name, value in _flat(entry, f"{key}.{part}" if key else part).items()}
