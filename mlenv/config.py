"""What an experiment is: the typed sections of a config file and the checks that cross them."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from mlenv.errors import ConfigError, MlenvError, Problems, check_above, check_at_least, nearest, placed_under
from mlenv.kinds import class_of, kind_field, kind_of
from mlenv.schema import Schema

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from numpy.typing import NDArray
    from torch import nn

CONFIG_FILE = "config.yaml"
"""The composed config in the output folder of a run, in its checkpoints, and among its artifacts in MLflow."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ModelConfig(Protocol):
    """Builds a model that takes a ``Batch`` and returns ``logits``, ``(batch, tasks)`` float32.

    ``embeddings`` turns the batch's ids into vectors (``mlenv.modules.Embeddings``); the model keeps it as a submodule.
    """

    def build(self, schema: Schema, embeddings: nn.Module) -> nn.Module: ...


MODELS: dict[str, type | str] = {"ranker": "mlenv.modules.ranker:RankerConfig"}
"""Models by the name that ``model.kind`` takes; a team's own is named by its import path."""


class CalibratorConfig(Protocol):
    """Fits a module that turns the logits of one task, ``(batch,)``, into predictions.

    A module with segments also takes the codes of their values, ``(batch, columns)`` int64, 0 for null and for unseen ones.
    """

    @property
    def calibrator(self) -> type[nn.Module]:
        """Class of the module; its constructor takes its persistent buffers by name, as numbers or nested lists."""

    @property
    def needs_labels(self) -> bool:
        """Whether held-out rows are looked at."""

    @property
    def segments(self) -> tuple[str, ...]:
        """Columns of ``schema.segments`` whose values matter."""

    def fit(
        self, logits: NDArray[np.float64], labels: NDArray[np.float64], weights: NDArray[np.float64], segments: NDArray[np.int64] | None
    ) -> nn.Module: ...


CALIBRATORS: dict[str, type | str] = {
    "histogram": "mlenv.modules.histogram_calibration:HistogramConfig",
    "isotonic": "mlenv.modules.isotonic_calibration:IsotonicConfig",
    "logistic": "mlenv.modules.logistic_calibration:LogisticConfig",
    "negative_sampling": "mlenv.modules.logistic_calibration:NegativeSamplingConfig",
    "platt": "mlenv.modules.logistic_calibration:PlattConfig",
    "temperature": "mlenv.modules.logistic_calibration:TemperatureConfig",
}
"""Calibrators by the name that ``calibration.TASK.kind`` takes."""


class _RowTransform(Protocol):
    """What every transform says about itself."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns that it looks at, beside the row key."""

    @property
    def writes(self) -> tuple[str, ...]:
        """Columns that it makes, new or in place of others."""

    @property
    def drops_rows(self) -> bool:
        """Whether fewer rows may come out than go in."""

    @property
    def sampling_seed(self) -> int | None:
        """Seed with which it draws the fate of a row from ``schema.row_key``; None when it draws nothing."""

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        """The columns after it, given those before; raises ConfigError when it cannot use them."""


@runtime_checkable
class TransformConfig(_RowTransform, Protocol):
    """Turns the rows of a row group into others before the schema reads them. A row's fate and its values hang on the row alone,
    so that they are the same on any number of workers and after a resume."""

    def held_out(self) -> TransformConfig | None:
        """What takes its place on rows that are not trained on; None for nothing."""

    def apply(self, rows: pa.RecordBatch, row_key: tuple[str, ...]) -> pa.RecordBatch:
        """The rows that stay, in order, with the columns ``writes``; columns that it does not know pass through."""


RowRule = Callable[["pa.RecordBatch", tuple[str, ...]], "pa.RecordBatch"]
"""Rows and the columns of the row key to the rows that stay."""


@dataclass(frozen=True)
class Findings:
    """What a look over the whole window gives."""

    dropped: Sequence[NDArray[np.int64]] = ()
    """For each row group, in the order of the files, the rows that go, in rising order; empty with ``apply``."""
    notes: tuple[str, ...] = ()
    """Why, for the log and the record of the run."""
    apply: RowRule | None = None
    """Instead of ``dropped``: what acts on each row group by what the window showed, as ``TransformConfig.apply`` does. It can be
    pickled."""


@runtime_checkable
class WindowTransformConfig(_RowTransform, Protocol):
    """Drops or weighs rows for a reason that only the whole window shows. The columns ``reads`` of all row groups are surveyed, in
    any order and in threads, before the first row is used."""

    def held_out(self) -> TransformConfig | WindowTransformConfig | None:
        """What takes its place on rows that are not trained on; None for nothing."""

    def survey(self, rows: pa.RecordBatch) -> Any:
        """What is kept of a row group."""

    def conclude(self, surveys: Sequence[Any]) -> Findings:
        """What follows from the surveys of all row groups, in the order of the files."""


@runtime_checkable
class TableTransformConfig(Protocol):
    """Adds columns of a table that lies beside the data."""

    @property
    def writes(self) -> tuple[str, ...]:
        """Columns that it makes, new or in place of others."""

    @property
    def sampling_seed(self) -> int | None:
        """None: it draws nothing."""

    def open(self, event_time: str) -> TableTransform:
        """What acts on rows; ``event_time`` is the schema's."""


@runtime_checkable
class TableTransform(TransformConfig, Protocol):
    """A transform whose table is opened, and whose rows are read when they are first asked for."""

    @property
    def fingerprint(self) -> str:
        """Changes when the table does."""

    def measure(self, rows: pa.RecordBatch) -> Any:
        """How many of these rows find something in the table."""

    def conclude(self, by_day: Mapping[str, Sequence[Any]], window: str) -> dict[str, Any]:
        """What is kept of the measures of a window; raises DataError when they show that the join does not work."""


@runtime_checkable
class LabelTransformConfig(TableTransformConfig, Protocol):
    """Makes a label that is known only some time after its row."""

    @property
    def days_until_known(self) -> int:
        """Whole days after the day of a row until its label is known."""

    @property
    def masks(self) -> Mapping[str, str]:
        """Labels that are null while they are not known, and the column that says where they are."""


TRANSFORMS: dict[str, type | str] = {
    "bucket": "mlenv.datasets.transforms.values:BucketConfig",
    "clip": "mlenv.datasets.transforms.values:ClipConfig",
    "deduplicate": "mlenv.datasets.transforms.deduplicate:DeduplicateConfig",
    "derive": "mlenv.datasets.transforms.derive:DeriveConfig",
    "exclude_outliers": "mlenv.datasets.transforms.outliers:ExcludeOutliersConfig",
    "filter": "mlenv.datasets.transforms.filter:FilterConfig",
    "hash": "mlenv.datasets.transforms.values:HashConfig",
    "join": "mlenv.datasets.transforms.join:JoinConfig",
    "label_events": "mlenv.datasets.transforms.label_events:LabelEventsConfig",
    "python": "mlenv.datasets.transforms.python_function:PythonConfig",
    "sample": "mlenv.datasets.transforms.sampling:SampleConfig",
    "sample_negatives": "mlenv.datasets.transforms.sampling:SampleNegativesConfig",
    "stratify": "mlenv.datasets.transforms.stratify:StratifyConfig",
    "truncate": "mlenv.datasets.transforms.values:TruncateConfig",
}
"""Transforms by the name that ``data.transforms[N].kind`` takes."""


class Workers(Protocol):
    """Those who read and decode rows ahead of the training."""

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Generator[_Result, None, None]:
        """Results in the order of the items, a bounded number ahead of the one that is used. An error of the function is
        raised in its place. The function gives the same for the same item, and may be called for it again."""

    def close(self) -> None:
        """Ends what was started for them; they may be used again."""


class WorkersConfig(Protocol):
    """Where rows are read and decoded. It changes nothing about the rows, their order or their numbers."""

    def build(self) -> Workers:
        """Starts nothing before the first item."""


WORKERS: dict[str, type | str] = {
    "ray": "mlenv.datasets.ray_workers:RayConfig",
    "threads": "mlenv.datasets.workers:ThreadsConfig",
}
"""Workers by the name that ``data.workers.kind`` takes."""


def _threads() -> WorkersConfig:
    config: WorkersConfig = class_of("threads", WORKERS, "data.workers")()
    return config


def is_day(text: str) -> bool:
    """Whether a text is a day as YYYY-MM-DD; days are compared as texts, so no other form will do."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """A part of the data: a folder, and the days of it that count, both ends included."""

    path: str = ""
    """Folder or file under ``data.path``; empty for all of it."""
    start: str = ""
    """First day, YYYY-MM-DD, of the partitions ``date=...``; empty for the earliest."""
    end: str = ""
    """Last day; empty for the latest."""
    skip_dates: tuple[str, ...] = ()
    """Days between them that do not count, such as those of an outage."""

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if getattr(self, name) and not is_day(getattr(self, name)):
                raise ConfigError(name, expected="a day as YYYY-MM-DD", received=getattr(self, name))
        _check_days("skip_dates", self.skip_dates)
        if PurePosixPath(self.path).is_absolute() or ".." in PurePosixPath(self.path).parts:
            raise ConfigError("path", expected="a folder or file under data.path", received=self.path)
        if self.start and self.end and self.start > self.end:
            raise ConfigError("start", expected=f"a day not after the end {self.end}", received=self.start)

    def holds(self, day: str) -> bool:
        """Whether the rows of a day belong to the window; "" for rows without a day."""
        if not (self.start or self.end or self.skip_dates):
            return True
        return is_day(day) and (self.start or day) <= day <= (self.end or day) and day not in self.skip_dates

    def overlaps(self, other: WindowConfig) -> bool:
        """Whether both windows can hold the same day of the same file; a day that one of them skips still lies within it."""
        latest = "9999-12-31"
        mine, theirs = PurePosixPath(self.path), PurePosixPath(other.path)
        if not (mine.is_relative_to(theirs) or theirs.is_relative_to(mine)):
            return False
        return self.start <= (other.end or latest) and other.start <= (self.end or latest)

    def __str__(self) -> str:
        days = f"{self.start or 'earliest'} to {self.end or 'latest'}" if self.start or self.end else "all days"
        days += f" without {', '.join(self.skip_dates)}" if self.skip_dates else ""
        return f"{self.path}: {days}" if self.path else days


@dataclass(frozen=True, kw_only=True)
class DaysConfig:
    """Windows by their lengths, counted back from the last day: training, then validation, then as many days as the labels
    have to wait, then test. ``data.days`` is written instead of the windows, which ``compose`` puts in its place."""

    end_date: str
    """Last day of the test window, YYYY-MM-DD."""
    num_train_days: int
    """Days that are trained on."""
    num_test_days: int
    """Days that the model is measured on."""
    num_validation_days: int = 0
    """Days between both, for early stopping and calibration."""
    skip_dates: tuple[str, ...] = ()
    """Days that do not count; a window reaches further back instead."""

    def __post_init__(self) -> None:
        _check_days("end_date", (self.end_date,))
        _check_days("skip_dates", self.skip_dates)
        for name, least in (("num_train_days", 1), ("num_test_days", 1), ("num_validation_days", 0)):
            check_at_least(name, getattr(self, name), least)

    def windows(self, label_wait_days: int = 0) -> dict[str, WindowConfig]:
        """The windows by the names that they have under ``data``.

        Raises:
            ConfigError: they reach back beyond the first year.
        """
        try:
            return self._windows(label_wait_days)
        except OverflowError as error:
            raise ConfigError("num_train_days", expected="days that the calendar has", received=self.num_train_days) from error

    def _windows(self, label_wait_days: int) -> dict[str, WindowConfig]:
        last, windows = datetime.date.fromisoformat(self.end_date), {}
        for name, num_days in (("test", self.num_test_days), ("validation", self.num_validation_days), ("train", self.num_train_days)):
            days = list(islice(self._back_from(last), num_days))
            if days:
                skipped = tuple(sorted(day for day in self.skip_dates if days[-1].isoformat() < day < days[0].isoformat()))
                windows[name] = WindowConfig(start=days[-1].isoformat(), end=days[0].isoformat(), skip_dates=skipped)
                last = days[-1] - datetime.timedelta(days=1)
            if name == "test":
                last -= datetime.timedelta(days=label_wait_days)
        return windows

    def _back_from(self, day: datetime.date) -> Iterator[datetime.date]:
        for distance in count():
            earlier = day - datetime.timedelta(days=distance)
            if earlier.isoformat() not in self.skip_dates:
                yield earlier


def _check_days(name: str, days: Sequence[str]) -> None:
    for day in days:
        if not is_day(day):
            raise ConfigError(name, expected="a day as YYYY-MM-DD", received=day)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they are read."""

    path: str
    """Folder of Parquet files, local or as a URL that Arrow or fsspec knows."""
    train: WindowConfig
    """What the model learns from."""
    test: WindowConfig | None = None
    """Held-out rows, scored when training ends."""
    validation: WindowConfig | None = None
    """Held-out rows, scored every ``loop.evaluate_every_steps`` steps; calibrators are fitted on them."""
    label_wait_days: int = 0
    """Days until a label is known: at least as many lie between the training window and the test window."""
    allow_missing_days: bool = False
    """Whether a window may have days without rows that it does not skip."""
    transforms: tuple[TransformConfig | WindowTransformConfig | TableTransformConfig, ...] = kind_field(TRANSFORMS, default=())
    """What happens to the rows before the schema reads them, in order. The columns that they make act as columns of the files."""
    on_bad_file: Literal["fail", "skip"] = "fail"
    """skip passes over row groups that cannot be read; to know them before the first step the rows are read once more."""
    max_bad_row_groups: int = 0
    """Row groups of a window that may be passed over; a file without a readable footer counts as one."""
    content_hash: Literal["bytes", "footers"] = "bytes"
    """What ``dataset.json`` tells files by: all their bytes, or their Parquet footers alone where reading all would take too long."""
    batch_size: int = 4096
    """Examples per step and rank."""
    num_epochs: int = 1
    """Passes over the training window."""
    shuffle_rows: int = 262_144
    """Rows that are shuffled together, at least a row group; 0 reads in file order. Bounds the memory of the reader."""
    workers: WorkersConfig = kind_field(WORKERS, default_factory=_threads)
    """Who reads and decodes ahead of the training: threads, or the CPUs of a Ray cluster."""

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "num_epochs": 1, "shuffle_rows": 0, "label_wait_days": 0, "max_bad_row_groups": 0}
        for name, smallest in least.items():
            check_at_least(name, getattr(self, name), smallest)
        if not self.path:
            raise ConfigError("path", expected="a folder of Parquet files", received=self.path)
        if (self.on_bad_file == "skip") != (self.max_bad_row_groups > 0):
            expected = "a number > 0 with on_bad_file: skip, and 0 with fail"
            raise ConfigError("max_bad_row_groups", expected=expected, received=self.max_bad_row_groups)


TableOptimizer = Literal["row_wise_adagrad", "adam", "sgd"]


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """How one table is trained where it is not trained like all others; what is null is taken from ``embeddings``."""

    optimizer: TableOptimizer | None = None
    """With another optimizer than that of ``embeddings`` the learning rate must be named, because rates do not carry over."""
    learning_rate: float | None = None
    """Before warm-up and decay."""
    eps: float | None = None
    """See ``embeddings.eps``; sgd takes none."""
    weight_decay: float | None = None
    """See ``embeddings.weight_decay``; 0 spares the table where others have a penalty."""
    sharding: Literal["table_wise", "row_wise", "column_wise"] | None = None
    """How the engine torchrec divides the table over processes; null leaves it to TorchRec's planner."""

    def __post_init__(self) -> None:
        if self.learning_rate is not None:
            check_above("learning_rate", self.learning_rate, 0)
        for name in ("eps", "weight_decay"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class EmbeddingsConfig:
    """Which engine holds the tables. Both have the same table names, logits and training curve."""

    engine: Literal["torch", "torchrec"] = "torch"
    """torch: plain tables, everywhere, exportable; torchrec: fused update and sharding over ranks."""
    optimizer: TableOptimizer = "row_wise_adagrad"
    """row_wise_adagrad and sgd touch the rows that a step looks up; adam every row at every step, which only small tables can afford."""
    init_std: float = 0.01
    """Standard deviation of the initial rows, normal around zero."""
    learning_rate: float = 0.02
    """Of row-wise Adagrad, which keeps one accumulator per row (Duchi et al. 2011; Mudigere et al. 2022, arXiv:2104.05158), of Adam
    or of plain gradient descent."""
    eps: float = 1e-8
    """Added to the root of the accumulator, or of Adam's second moment; sgd has none."""
    weight_decay: float = 0.0
    """L2 penalty: this times a row is added to its gradient; of the rows that a step looks up, under adam of all rows; sgd has none."""
    sharding: Literal["table_wise", "row_wise", "column_wise"] | None = None
    """How the engine torchrec divides tables over processes; null leaves it to TorchRec's planner."""
    tables: dict[str, TableConfig] = field(default_factory=dict)
    """What is different for a table, by its name in ``schema.tables``."""

    def __post_init__(self) -> None:
        check_above("learning_rate", self.learning_rate, 0)
        for name in ("init_std", "eps", "weight_decay"):
            check_at_least(name, getattr(self, name), 0)
        if self.optimizer == "sgd" and self.weight_decay:
            raise ConfigError("weight_decay", expected="0 under sgd", received=self.weight_decay)
        for name, table in self.tables.items():
            other = table.optimizer not in (None, self.optimizer)
            if other and table.learning_rate is None:
                expected = f"a number, because {table.optimizer} takes another rate than {self.optimizer}"
                raise ConfigError(f"tables.{name}.learning_rate", expected=expected, received=None)
            with placed_under(f"tables.{name}"):
                if self.of(name).optimizer == "sgd" and table.eps is not None:
                    raise ConfigError("eps", expected="null, because sgd has none", received=table.eps)

    def of(self, table: str) -> EmbeddingsConfig:
        """The same with what is different for a table in place, and without a word about others."""
        different = dataclasses.asdict(self.tables.get(table, TableConfig()))
        return replace(self, tables={}, **{name: value for name, value in different.items() if value is not None})


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


def _adamw() -> OptimizerConfig:
    config: OptimizerConfig = class_of("adamw", OPTIMIZERS, "optimizer")()
    return config


class LossConfig(Protocol):
    """Builds a module ``(logits, labels, weights, requests) -> (tasks,)``, the mean loss of each task over what counts.

    ``logits``, ``labels`` in [0, 1] and ``weights`` >= 0 are ``(batch, tasks)`` float32; ``requests`` is ``(batch,)`` int64
    as in ``Batch``, or None where ``reads_requests`` is False. A weight of 0 hides an example from a task; a row of weight 2
    counts as two rows. A task for which nothing counts has the loss 0 and no gradient.
    """

    reads_requests: ClassVar[bool]

    def build(self) -> nn.Module: ...


LOSSES: dict[str, type | str] = {
    "binary_cross_entropy": "mlenv.modules.pointwise_losses:BinaryCrossEntropyConfig",
    "fake_negative_weighted": "mlenv.modules.delayed_feedback:FakeNegativeWeightedConfig",
    "focal": "mlenv.modules.pointwise_losses:FocalLossConfig",
    "generalized_cross_entropy": "mlenv.modules.noise_robust_losses:GeneralizedCrossEntropyConfig",
    "listwise": "mlenv.modules.request_losses:ListwiseLossConfig",
    "pairwise": "mlenv.modules.request_losses:PairwiseLossConfig",
    "symmetric_cross_entropy": "mlenv.modules.noise_robust_losses:SymmetricCrossEntropyConfig",
}
"""Losses by the name that ``objective.losses.TASK.kind`` takes."""


class BalanceConfig(Protocol):
    """Builds what weighs the losses of the tasks against each other; see ``mlenv.modules.task_balance``."""

    def build(self, num_tasks: int, model: nn.Module) -> nn.Module: ...


BALANCES: dict[str, type | str] = {
    "grad_norm": "mlenv.modules.task_balance:GradNormConfig",
    "pcgrad": "mlenv.modules.task_balance:PCGradConfig",
    "uncertainty": "mlenv.modules.task_balance:UncertaintyConfig",
}
"""Balances by the name that ``objective.balance.kind`` takes."""


@dataclass(frozen=True, kw_only=True)
class HiddenDistillationConfig:
    """Draws a layer of the student towards a layer of the teacher, through a linear map that is learnt and thrown away."""

    weight: float = 1.0
    """Of this term beside the other losses."""
    student_part: str = "experts"
    """Part of the student whose input is drawn."""
    teacher_part: str = "experts"
    """Part of the teacher towards whose input it is drawn."""

    def __post_init__(self) -> None:
        check_above("weight", self.weight, 0)


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What a teacher adds to the losses: the student learns its predictions beside the labels."""

    teacher: str = ""
    """Who teaches: the output folder or a checkpoint of a training, or a model that MLflow keeps (``runs:/RUN/model``,
    ``models:/NAME@ALIAS``). Empty for predictions in the columns that ``schema.labels.TASK.teacher`` names."""
    loss: Literal["soft_labels", "pairwise"] = "soft_labels"
    """soft_labels learns the teacher's probabilities; pairwise its order of the rows of a request, and how sure it is of it."""
    temperature: float = 1.0
    """Logits of both are divided by it; above 1 shows more of what the teacher holds for unlikely."""
    weight: float = 1.0
    """Of the teacher's term beside the loss of the labels, which keeps the weight 1."""
    final_weight: float | None = None
    """Weight at the last step, reached in a straight line; null keeps it constant."""
    unlabeled_rows: bool = False
    """Learn from the teacher also where the label is hidden, such as on rows that were made up to be taught on."""
    hidden: HiddenDistillationConfig | None = None
    """Learns from an inner layer of the teacher as well; needs a teacher that is a model."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """What the teacher computes in."""
    calibrated: bool = False
    """Learn the teacher's calibrated predictions. Its logits teach more: calibrators flatten what they cannot tell apart, were
    fitted on days that the student may be measured on, and the labels give the student its level anyway."""

    def __post_init__(self) -> None:
        check_above("temperature", self.temperature, 0)
        for name, value in (("weight", self.weight), ("final_weight", self.final_weight)):
            if value is not None:
                check_at_least(name, value, 0)
        if self.hidden is not None and not self.teacher:
            fix = "name a checkpoint in teacher, or set hidden to null"
            raise ConfigError("hidden", expected="null, because columns hold no inner layers", received="a layer", fix=fix)
        if self.calibrated and not self.teacher:
            raise ConfigError("calibrated", expected="false, because columns are taken as they are", received=True)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the training lowers: a loss per task, a mean over the examples that count; by default their sum."""

    losses: dict[str, LossConfig] = kind_field(LOSSES, default_factory=dict)
    """Loss of a task; binary cross-entropy for a task that is not named."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Weight of a task in the sum; 1 for a task that is not named."""
    balance: BalanceConfig | None = kind_field(BALANCES, default=None)
    """What weighs the tasks against each other while they are learnt, beside the fixed weights; null adds them up."""
    distillation: DistillationConfig | None = None
    """A teacher; null learns from the labels alone."""

    def __post_init__(self) -> None:
        for task, weight in self.task_weights.items():
            check_at_least(f"task_weights.{task}", weight, 0)

    @property
    def reads_requests(self) -> bool:
        """Whether a loss compares the rows of a request."""
        pairs = self.distillation is not None and self.distillation.loss == "pairwise"
        return pairs or any(loss.reads_requests for loss in self.losses.values())

    @property
    def reads_teacher_columns(self) -> bool:
        """Whether the teacher's predictions come with the rows."""
        return self.distillation is not None and not self.distillation.teacher


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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """bf16-mixed computes the dense part in bfloat16 and keeps float32 weights."""
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
            ("max_skipped_steps", 0),
            ("hang_timeout_seconds", 0),
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
        if self.max_loss is not None:
            check_above("max_loss", self.max_loss, 0)


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How many processes of this machine train together. torchrun starts processes on several machines, with the same command."""

    num_processes: int = 1
    """Each takes a share of the rows and, with the engine torchrec, of the tables; with GPUs, one for each."""
    max_restarts: int = 3
    """How often all are started again, from the last checkpoint, when one of them has died."""

    def __post_init__(self) -> None:
        check_at_least("num_processes", self.num_processes, 1)
        check_at_least("max_restarts", self.max_restarts, 0)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps the run."""

    enabled: bool = True
    """Without it the numbers stay in the output folder only."""
    uri: str = ""
    """Tracking server; MLFLOW_TRACKING_URI when empty, and without that a SQLite file in the current folder."""
    experiment: str = "mlenv"
    """MLflow experiment that the run belongs to."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """From where on a figure is a warning, and from where on a failure; null for never."""

    warn: float | None
    fail: float | None

    def __post_init__(self) -> None:
        for name, value in (("warn", self.warn), ("fail", self.fail)):
            if value is not None:
                check_at_least(name, value, 0)
        if self.warn is not None and self.fail is not None and self.warn > self.fail:
            raise ConfigError("warn", expected=f"at most the limit of a failure, {self.fail}", received=self.warn)


@dataclass(frozen=True, kw_only=True)
class ChecksConfig:
    """What the data are held to, by ``mlenv validate`` and before a training. For a core feature a warning is a failure.

    A difference counts only when it is larger than its limit and than what chance brings in so few rows.
    """

    before_training: bool = False
    """Judge the training window before the first step; a failure stops the training with exit code 3."""
    baseline: str = ""
    """What the training window is compared with then: statistics in a file, or in the output folder of an earlier training;
    empty for nothing, and then it is judged by itself."""
    may_drift: tuple[str, ...] = ()
    """Features whose distribution is free to change, such as the weekend: psi, jensen_shannon, kolmogorov_smirnov and
    out_of_range leave them out."""
    significance: float = 4.0
    """Standard errors that a difference must exceed; of rows that come in requests, a request counts as one row."""
    coverage_drop: Limits = Limits(warn=0.01, fail=0.1)
    """Share of the rows that a feature is missing from and was not missing from before."""
    psi: Limits = Limits(warn=0.1, fail=0.25)
    """Population stability index: of numbers over tenths of the baseline, of ids over those that are at least 2 % of it and the rest."""
    jensen_shannon: Limits = Limits(warn=0.02, fail=0.1)
    """Jensen-Shannon divergence in bits over the same parts: 0 for equal ones, 1 where nothing is shared."""
    kolmogorov_smirnov: Limits = Limits(warn=0.1, fail=0.25)
    """Largest distance between two cumulative distributions of a number."""
    out_of_range: Limits = Limits(warn=0.001, fail=0.05)
    """Share of the numbers that lie below the least or above the greatest of the baseline."""
    new_value: Limits = Limits(warn=0.02, fail=0.1)
    """Share of one value that the baseline does not have."""
    lost_value: Limits = Limits(warn=0.02, fail=0.1)
    """Share in the baseline of one value that is gone."""
    unseen_ids: Limits = Limits(warn=0.9, fail=0.97)
    """Share of all ids that the baseline does not have; many, where a day brings new users and items."""
    label_rate: Limits = Limits(warn=0.2, fail=0.35)
    """Relative change of the label rate of a task, over all and on each day."""
    label_rate_by_segment: Limits = Limits(warn=0.5, fail=None)
    """Relative change of the label rate of a task for a value of a segment column."""
    missing_days: Limits = Limits(warn=None, fail=1)
    """Days without rows inside the window."""
    late_hours: Limits = Limits(warn=1, fail=6)
    """Hours by which the newest event of a day lies further from the day's end than that of any day of the baseline."""
    repeated_keys: Limits = Limits(warn=0.0001, fail=0.01)
    """Share of the rows whose row key an earlier row has."""
    repeated_rows: Limits = Limits(warn=0.001, fail=0.01)
    """Share of the rows that repeat another one in all but the row key; judged where the rows have an event time."""
    leakage_auc: Limits = Limits(warn=0.9, fail=0.95)
    """AUC of one feature alone for a task."""
    backfill_label_auc: Limits = Limits(warn=0.02, fail=0.05)
    """With ``--backfilled``: AUC of one feature alone for a task on back-filled days minus the same on days that were logged."""
    backfills: dict[str, str] = field(default_factory=dict)
    """Back-filled columns and the columns beside them that hold the same as it was logged; compared row by row."""
    backfill_tolerance: float = 1e-6
    """Difference relative to the larger one up to which two numbers agree; integers, texts and truth values agree only when equal."""
    backfill_disagreement: Limits = Limits(warn=0.01, fail=0.1)
    """Share of the rows with both columns of a pair in which they differ, over all and on the worst day."""

    def __post_init__(self) -> None:
        check_at_least("significance", self.significance, 0)
        check_at_least("backfill_tolerance", self.backfill_tolerance, 0)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything that decides a model: *model = f(config)*."""

    name: str
    """Name of the run, for people."""
    output: str
    """Folder of the run: checkpoints, metrics, predictions, report. Its parent must exist."""
    schema: Schema
    data: DataConfig
    model: ModelConfig = kind_field(MODELS)
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    optimizer: OptimizerConfig = kind_field(OPTIMIZERS, default_kind="adamw", default_factory=_adamw)
    """Of all that is not an embedding table; AdamW where no kind is named."""
    objective: ObjectiveConfig = ObjectiveConfig()
    calibration: dict[str, CalibratorConfig] = kind_field(CALIBRATORS, default_factory=dict)
    """Corrects the predictions of a task, fitted on ``data.validation`` once the training has ended; a task that is not named
    keeps the sigmoid of its logits."""
    loop: LoopConfig = LoopConfig()
    launch: LaunchConfig = LaunchConfig()
    checks: ChecksConfig = ChecksConfig()
    tracking: TrackingConfig = TrackingConfig()
    seed: int = 0
    """Of initial weights, row order and dropout."""


def check(config: ExperimentConfig) -> None:
    """Checks what crosses sections.

    Raises:
        Problems: names every problem at once.
    """
    problems = list(_problems(config))
    if problems:
        raise Problems("config", problems)


def _problems(config: ExperimentConfig) -> Iterator[MlenvError]:
    schema, data, loop = config.schema, config.data, config.loop
    yield from _objective_problems(config.objective, schema)
    for name, window in (("validation", data.validation), ("test", data.test)):
        if window is not None and window.overlaps(data.train):
            yield ConfigError(f"data.{name}", expected=f"days outside the training window ({data.train})", received=str(window))
    yield from _waiting_problems(data)
    yield from _transform_problems(config)
    uses = ["loop.evaluate_every_steps"] if loop.evaluate_every_steps else []
    uses += [f"calibration.{task}" for task, calibrator in config.calibration.items() if calibrator.needs_labels]
    if uses and data.validation is None:
        fix = "set data.validation.start and end, or path"
        yield ConfigError("data.validation", expected=f"a window, because of {', '.join(uses)}", received=None, fix=fix)
    if data.validation is not None and not uses:
        fix = "set loop.evaluate_every_steps or calibration, or take the window out"
        yield ConfigError("data.validation", expected="something that uses it", received=str(data.validation), fix=fix)
    for task, calibrator in config.calibration.items():
        if task not in schema.tasks:
            fix = nearest(task, schema.tasks)
            yield ConfigError(f"calibration.{task}", expected="a task of schema.labels", received=task, fix=fix)
        for column in set(calibrator.segments) - set(schema.segments):
            fix = f"add it to schema.segments; {nearest(column, schema.segments)}"
            yield ConfigError(f"calibration.{task}.segments", expected="columns of schema.segments", received=column, fix=fix)
    for feature in set(config.checks.may_drift) - set(schema.features):
        yield ConfigError("checks.may_drift", expected="features of the schema", received=feature, fix=nearest(feature, schema.features))
    yield from _monitor_problems(config)
    yield from _table_optimizer_problems(config)
    yield from _accumulation_problems(config)
    if config.embeddings.engine == "torchrec":
        for name, table in schema.tables.items():
            if table.embedding_dim % 4:
                fix = "round it up, or set embeddings.engine to torch"
                yield ConfigError(
                    f"schema.tables.{name}.embedding_dim", expected="a multiple of 4 for torchrec", received=table.embedding_dim, fix=fix
                )
        if not schema.tables:
            yield ConfigError("embeddings.engine", expected="torch, because the schema has no embedding table", received="torchrec")
    if not 0 <= config.seed < 2**63:
        yield ConfigError("seed", expected="an integer in [0, 2^63)", received=config.seed)
    if config.embeddings.engine == "torchrec" and importlib.util.find_spec("torchrec") is None:
        fix = "pip install 'mlenv[torchrec]', or embeddings.engine=torch"
        yield ConfigError("embeddings.engine", expected="an engine that is installed", received="torchrec", fix=fix)
    if kind_of(data.workers, WORKERS) == "ray" and importlib.util.find_spec("ray") is None:
        fix = "pip install 'mlenv[ray]', or data.workers.kind=threads"
        yield ConfigError("data.workers.kind", expected="workers that are installed", received="ray", fix=fix)


def _waiting_problems(data: DataConfig) -> Iterator[MlenvError]:
    """Windows whose labels were not known yet when the test window began."""
    if data.test is None or not data.label_wait_days:
        return
    for name, window in (("train", data.train), ("validation", data.validation)):
        if window is None or not window.end or window.overlaps(data.test):
            continue
        latest = datetime.date.max.toordinal()
        known = datetime.date.fromordinal(min(datetime.date.fromisoformat(window.end).toordinal() + data.label_wait_days, latest))
        if replace(window, end=known.isoformat()).overlaps(data.test):
            fix = "end it earlier, or let the test window begin later"
            expected = f"days before the test window ({data.test}) by more than label_wait_days, {data.label_wait_days}"
            yield ConfigError(f"data.{name}", expected=expected, received=str(window), fix=fix)


def _is_transform(value: object) -> bool:
    return isinstance(value, (TransformConfig, WindowTransformConfig, TableTransformConfig))


def _transform_problems(config: ExperimentConfig) -> Iterator[MlenvError]:
    """Samplers without a key, samplers that would draw the same, and sampling that is corrected twice."""
    drawn: dict[tuple[str, int], int] = {}
    for place, transform in enumerate(config.data.transforms):
        kind, key = kind_of(transform, TRANSFORMS), f"data.transforms[{place}]"
        if not _is_transform(transform):
            expected = "a class with the members of mlenv.config.TransformConfig, WindowTransformConfig or TableTransformConfig"
            yield ConfigError(f"{key}.kind", expected=expected, received=kind)
            continue
        if transform.sampling_seed is not None:
            if not config.schema.row_key:
                fix = "name the columns that identify a row"
                yield ConfigError("schema.row_key", expected=f"columns, because {key} samples by it", received=[], fix=fix)
            first = drawn.setdefault((kind, transform.sampling_seed), place)
            if first != place:
                expected = f"another seed than data.transforms[{first}], or both would keep the same rows"
                yield ConfigError(f"{key}.seed", expected=expected, received=transform.sampling_seed)
        if isinstance(transform, LabelTransformConfig):
            yield from _label_problems(config, transform, key)
        for task, calibrator in config.calibration.items():
            weight = config.schema.labels[task].weight if task in config.schema.labels else ""
            if kind == "sample_negatives" and weight in transform.writes and kind_of(calibrator, CALIBRATORS) == "negative_sampling":
                fix = f"take out calibration.{task}, or {key}.weight_column and schema.labels.{task}.weight"
                expected = f"another kind, because the weights of {key} correct the sampling already"
                yield ConfigError(f"calibration.{task}.kind", expected=expected, received="negative_sampling", fix=fix)


def _label_problems(config: ExperimentConfig, transform: LabelTransformConfig, key: str) -> Iterator[MlenvError]:
    """Labels of rows too young to have one, and labels that were not known yet when the test window began."""
    for task, label in config.schema.labels.items():
        mask = transform.masks.get(label.column or task)
        if mask and not label.mask:
            fix = f"set it to {mask}, or take out {key}.mask_column to leave out rows whose label is not known"
            yield ConfigError(f"schema.labels.{task}.mask", expected="a column, because the label may be null", received="", fix=fix)
    data, days = config.data, transform.days_until_known
    if data.test is not None and data.label_wait_days < days:
        fix = f"set it to {days}, and end the training window earlier"
        expected = f"at least {days}, because {key} knows a label only then"
        yield ConfigError("data.label_wait_days", expected=expected, received=data.label_wait_days, fix=fix)


def _table_optimizer_problems(config: ExperimentConfig) -> Iterator[MlenvError]:
    """Tables that are not there, and optimizers that TorchRec does not have."""
    embeddings, tables = config.embeddings, config.schema.tables
    for name in embeddings.tables.keys() - tables.keys():
        yield ConfigError(f"embeddings.tables.{name}", expected="a table of schema.tables", received=name, fix=nearest(name, tables))
    named: dict[str, EmbeddingsConfig | TableConfig] = {"embeddings": embeddings}
    named |= {f"embeddings.tables.{name}": table for name, table in embeddings.tables.items()}
    if embeddings.engine != "torchrec":
        for key in (key for key, options in named.items() if options.sharding):
            fix = "set embeddings.engine to torchrec"
            yield ConfigError(
                f"{key}.sharding", expected="null, because the engine torch copies tables", received=embeddings.engine, fix=fix
            )
        return
    fix = "set embeddings.engine to torch"
    for key, options in named.items():
        if options.optimizer == "adam":
            expected = "row_wise_adagrad or sgd, because TorchRec has no Adam on a CPU, and on a GPU one that skips rows without a gradient"
            yield ConfigError(f"{key}.optimizer", expected=expected, received="adam", fix=fix)
        if options.weight_decay:
            expected = "0, because fbgemm's fused update on a CPU leaves the decay out"
            yield ConfigError(f"{key}.weight_decay", expected=expected, received=options.weight_decay, fix=fix)


def _accumulation_problems(config: ExperimentConfig) -> Iterator[MlenvError]:
    """What would make several small batches another step than one large batch."""
    if config.loop.accumulate_batches == 1:
        return
    objective = config.objective
    reasons = {
        "embeddings.engine=torchrec updates its tables in every backward pass": config.embeddings.engine == "torchrec",
        "objective.balance weighs the tasks anew in every backward pass": objective.balance is not None,
        "objective.distillation is a mean over other weights than those of the labels": objective.distillation is not None,
        "a loss that compares the rows of a request is no mean over rows": objective.reads_requests,
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        fix = "raise data.batch_size instead"
        received = config.loop.accumulate_batches
        yield ConfigError("loop.accumulate_batches", expected=f"1, because {reason}", received=received, fix=fix)


def _objective_problems(objective: ObjectiveConfig, schema: Schema) -> Iterator[MlenvError]:
    for section, tasks in (("losses", objective.losses), ("task_weights", objective.task_weights)):
        for task in tasks.keys() - set(schema.tasks):
            yield ConfigError(
                f"objective.{section}.{task}", expected="a task of schema.labels", received=task, fix=nearest(task, schema.tasks)
            )
    if objective.reads_requests and not schema.request:
        fix = "name the column in schema.request, or choose a loss that takes each row by itself"
        yield ConfigError("schema.request", expected="a column, because a loss compares the rows of a request", received="", fix=fix)
    if objective.reads_teacher_columns and not any(label.teacher for label in schema.labels.values()):
        fix = "name them, or name a checkpoint in objective.distillation.teacher"
        yield ConfigError("schema.labels", expected="a teacher column for at least one task", received="none", fix=fix)


def _monitor_problems(config: ExperimentConfig) -> Iterator[MlenvError]:
    """What keeps a training from choosing its best step."""
    loop, tasks = config.loop, config.schema.tasks
    if not loop.monitor:
        fix = f"set loop.monitor, for example to {tasks[0]}/auc" if tasks else "set loop.monitor"
        if loop.learning_rate_decay == "plateau":
            yield ConfigError(
                "loop.learning_rate_decay", expected="none, linear or cosine without loop.monitor", received="plateau", fix=fix
            )
        if loop.stop_after_evaluations:
            received = loop.stop_after_evaluations
            yield ConfigError("loop.stop_after_evaluations", expected="0 without loop.monitor", received=received, fix=fix)
        return
    task, _, metric = loop.monitor.partition("/")
    if task not in tasks:
        yield ConfigError(
            "loop.monitor", expected="TASK/METRIC with a task of schema.labels", received=loop.monitor, fix=nearest(task, tasks)
        )
    if metric not in MONITORS:
        expected = f"TASK/METRIC with one of {sorted(MONITORS)}"
        yield ConfigError(
            "loop.monitor", expected=expected, received=loop.monitor, fix=nearest(loop.monitor, [f"{task}/{name}" for name in MONITORS])
        )
    if metric == "grouped_auc" and not config.schema.request:
        fix = "name the column of the request in schema.request, or monitor auc"
        yield ConfigError("loop.monitor", expected="a metric that needs no schema.request", received=loop.monitor, fix=fix)
    if config.data.validation is None:
        fix = "set data.validation and loop.evaluate_every_steps"
        yield ConfigError("loop.monitor", expected="no monitor without data.validation", received=loop.monitor, fix=fix)
