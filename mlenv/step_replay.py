"""Running a step again that went wrong."""

from __future__ import annotations

import json
from pathlib import Path

from mlenv.composition import compose
from mlenv.experiment import Experiment
from mlenv.loops.bad_step import bad_step_checkpoint, load_batch
from mlenv.loops.checkpoint import load_tensors, verify
from mlenv.loops.ranks import rank
from mlenv.loops.step_statistics import StepStatistics, step_statistics
from mlenv.loops.training_run import CONFIG, PROGRESS
from mlenv.loops.training_state import model_tensors, random_tensors, set_random_tensors


def replay(folder: Path | str) -> StepStatistics:
    """Runs the step of a folder ``bad_step-NNNNNNNN`` again and says what its modules compute; nothing is written.

    The data of the training are not read. The tables are plain ones of PyTorch, whatever the engine was, so that there are gradients.

    Raises:
        CheckpointError: the folder holds no bad step, or is damaged.
    """
    folder = Path(folder)
    checkpoint = bad_step_checkpoint(folder)
    verify(checkpoint)
    config = compose(checkpoint / CONFIG, ["embeddings.engine=torch", f"output={folder}"])
    with Experiment(config) as experiment:
        experiment.total_steps = json.loads((checkpoint / PROGRESS).read_text())["total_steps"]
        objective = {f"objective.{name}": tensor for name, tensor in experiment.objective.state_dict().items()}
        random = random_tensors()
        load_tensors(checkpoint, {**model_tensors(experiment.model), **objective, **random})
        set_random_tensors(random)
        batch = load_batch(folder / f"batch-rank{rank()}.safetensors").to(experiment.fabric.device)
        return step_statistics(experiment.model, experiment.objective, batch, experiment.fabric.autocast)
