"""What an experiment is: the typed sections of a config file and the checks that cross them."""

from mlenv.config.checks import ChecksConfig, Limits
from mlenv.config.cross_checks import check
from mlenv.config.data import WORKERS, DataConfig, DaysConfig, WindowConfig, Workers, WorkersConfig, is_day
from mlenv.config.embeddings import EmbeddingsConfig, TableConfig, TableOptimizer
from mlenv.config.experiment import CALIBRATORS, CONFIG_FILE, MODELS, CalibratorConfig, ExperimentConfig, ModelConfig
from mlenv.config.gates import COMPARED, BoundsConfig, GatesConfig
from mlenv.config.job import JobConfig
from mlenv.config.launch import LAUNCHERS, Command, LauncherConfig
from mlenv.config.loop import MONITORS, OPTIMIZERS, LoopConfig, OptimizerConfig
from mlenv.config.objective import (
    BALANCES,
    LOSSES,
    BalanceConfig,
    DistillationConfig,
    HiddenDistillationConfig,
    LossConfig,
    ObjectiveConfig,
)
from mlenv.config.tracking import TrackingConfig
from mlenv.config.transforms import (
    TRANSFORMS,
    Findings,
    LabelTransformConfig,
    RowRule,
    TableTransform,
    TableTransformConfig,
    TransformConfig,
    WindowTransformConfig,
)
from mlenv.config.tuning import EARLY_STOPPING, SPACES, ResourcesConfig, TuningConfig
from mlenv.config.warm_start import WarmStartConfig

__all__ = [
    "BALANCES",
    "CALIBRATORS",
    "COMPARED",
    "CONFIG_FILE",
    "EARLY_STOPPING",
    "LAUNCHERS",
    "LOSSES",
    "MODELS",
    "MONITORS",
    "OPTIMIZERS",
    "SPACES",
    "TRANSFORMS",
    "WORKERS",
    "BalanceConfig",
    "BoundsConfig",
    "CalibratorConfig",
    "ChecksConfig",
    "Command",
    "DataConfig",
    "DaysConfig",
    "DistillationConfig",
    "EmbeddingsConfig",
    "ExperimentConfig",
    "Findings",
    "GatesConfig",
    "HiddenDistillationConfig",
    "JobConfig",
    "LabelTransformConfig",
    "LauncherConfig",
    "Limits",
    "LoopConfig",
    "LossConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ResourcesConfig",
    "RowRule",
    "TableConfig",
    "TableOptimizer",
    "TableTransform",
    "TableTransformConfig",
    "TrackingConfig",
    "TransformConfig",
    "TuningConfig",
    "WarmStartConfig",
    "WindowConfig",
    "WindowTransformConfig",
    "Workers",
    "WorkersConfig",
    "check",
    "is_day",
]
