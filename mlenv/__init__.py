"""One PyTorch training framework for ranking and recommendation.

The names below are loaded when they are first used: importing mlenv loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlenv.batch import Batch
    from mlenv.composition import compose
    from mlenv.experiment import Experiment
    from mlenv.inference.batch_inference import predict
    from mlenv.loops.evaluate import evaluate
    from mlenv.loops.fit import fit
    from mlenv.schema import Schema
    from mlenv.step_replay import replay
    from mlenv.training import train

__version__ = "0.1.0"

__all__ = ["Batch", "Experiment", "Schema", "compose", "evaluate", "fit", "predict", "replay", "train"]

_HOME = {
    "Batch": "mlenv.batch",
    "Experiment": "mlenv.experiment",
    "Schema": "mlenv.schema",
    "compose": "mlenv.composition",
    "evaluate": "mlenv.loops.evaluate",
    "fit": "mlenv.loops.fit",
    "predict": "mlenv.inference.batch_inference",
    "replay": "mlenv.step_replay",
    "train": "mlenv.training",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'mlenv' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
