"""A whole experiment: the sections of a config under their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mlenv.config.checks import ChecksConfig
from mlenv.config.data import DataConfig
from mlenv.config.embeddings import EmbeddingsConfig
from mlenv.config.gates import GatesConfig
from mlenv.config.job import JobConfig
from mlenv.config.launch import LAUNCHERS, LauncherConfig, torchrun
from mlenv.config.loop import OPTIMIZERS, LoopConfig, OptimizerConfig, adamw
from mlenv.config.objective import ObjectiveConfig
from mlenv.config.tracking import TrackingConfig
from mlenv.config.warm_start import WarmStartConfig
from mlenv.kinds import kind_field
from mlenv.schema import Schema

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

CONFIG_FILE = "config.yaml"
"""The composed config in the output folder of a run, in its checkpoints, and among its artifacts in MLflow."""


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
    optimizer: OptimizerConfig = kind_field(OPTIMIZERS, default_kind="adamw", default_factory=adamw)
    """Of all that is not an embedding table; AdamW where no kind is named."""
    objective: ObjectiveConfig = ObjectiveConfig()
    warm_start: WarmStartConfig | None = None
    """Begin with the weights of another training; null begins with fresh ones."""
    calibration: dict[str, CalibratorConfig] = kind_field(CALIBRATORS, default_factory=dict)
    """Corrects the predictions of a task, fitted on ``data.validation`` once the training has ended; a task that is not named
    keeps the sigmoid of its logits."""
    loop: LoopConfig = LoopConfig()
    launch: LauncherConfig = kind_field(LAUNCHERS, default_kind="torchrun", default_factory=torchrun)
    """How many processes train together, and who starts them; torchrun where no kind is named."""
    job: JobConfig = JobConfig()
    """The machines, where a scheduler starts the training."""
    checks: ChecksConfig = ChecksConfig()
    gates: GatesConfig = GatesConfig()
    """What the model is held to before it becomes champion, where ``mlenv promote`` is not told otherwise."""
    tracking: TrackingConfig = TrackingConfig()
    seed: int = 0
    """Of initial weights, row order and dropout."""
