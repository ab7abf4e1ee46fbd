"""mlenv's own training, from Parquet, as a contender of ``benchmarks.training_loop``.

``python -m benchmarks.mlenv_training MODEL PRECISION COMPILE FILE NUM_EMBEDDINGS`` trains as many steps as each line of its input says.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Literal

from benchmarks.criteo_shaped import schema_of
from benchmarks.training_turns import serve
from mlenv.config import DataConfig, EmbeddingsConfig, ExperimentConfig, LoopConfig, TrackingConfig, WindowConfig
from mlenv.experiment import Experiment
from mlenv.loops.fit import Progress, Run, fit
from mlenv.loops.train_step import StepOutput
from mlenv.modules import CrossNetConfig, FactorizationMachineConfig, MLPConfig, RankerConfig

MODELS = {
    "deepfm": RankerConfig(crossing=FactorizationMachineConfig(), deep=MLPConfig(hidden=(64, 32)), heads=MLPConfig(hidden=())),
    "dcn_v2": RankerConfig(crossing=CrossNetConfig(num_layers=3), deep=MLPConfig(hidden=(500, 500, 500)), heads=MLPConfig(hidden=())),
}
Precision = Literal["32-true", "bf16-mixed"]
Compile = Literal["none", "kernels"]


def config_of(model: str, precision: Precision, compile: Compile, file: Path, num_embeddings: int, output: Path) -> ExperimentConfig:
    """The experiment that is measured; 65,536 rows are shuffled together, as in a file with row groups of that size."""
    return ExperimentConfig(
        name=model,
        output=str(output),
        schema=schema_of(num_embeddings),
        data=DataConfig(path=str(file.parent), train=WindowConfig(path=file.name), shuffle_rows=65_536, num_epochs=1000),
        model=MODELS[model],
        embeddings=EmbeddingsConfig(engine="torchrec"),
        loop=LoopConfig(log_every_steps=20, precision=precision, compile=compile),
        tracking=TrackingConfig(enabled=False),
    )


class SameRunAgain:
    """A run that trains a number of steps more each time; it logs as a real one does, and keeps no checkpoints."""

    def __init__(self, run: Run) -> None:
        self._run, self._last, self.steps = run, Progress(), 0

    def restore(self) -> Progress:
        self._until = self._last.step + self.steps
        return self._last

    def log(self, progress: Progress, output: StepOutput) -> None:
        self._run.log(progress, output)

    def evaluate(self, progress: Progress) -> Progress:
        return progress

    def save(self, progress: Progress) -> None: ...

    def must_stop(self, progress: Progress) -> bool:
        return progress.step >= self._until

    def finish(self, progress: Progress) -> None:
        self._last = progress


def main(model: str, precision: Precision, compile: Compile, file: Path, num_embeddings: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Experiment(config_of(model, precision, compile, file, num_embeddings, Path(folder) / "run")) as made,
    ):
        run = SameRunAgain(made.run)
        _ = made.step

        def train(steps: int) -> int:
            run.steps, before = steps, run._last.examples
            return fit(made.step, made.source("train"), run, made.config.loop).examples - before

        serve(train)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))  # type: ignore[arg-type]
