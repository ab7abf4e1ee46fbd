"""Imports what a training or a server imports, so that Python writes its bytecode. Run while an image is built.

An image's user writes nothing there, and without bytecode every start compiles these modules anew.
"""

from __future__ import annotations

import importlib
import warnings
from contextlib import suppress
from typing import Final

MODULES: Final = (
    "torch",
    "torch.distributed.run",
    "torchrec",
    "lightning.fabric",
    "ray",
    "ray.train",
    "onnxruntime",
    "mlflow.tracking",
    "mlenv.cli",
    "mlenv.doctor",
    "mlenv.dry_run",
    "mlenv.training",
    "mlenv.serving.server",
    "mlenv.serving.export",
)
"""An image need not have all of them."""

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for module in MODULES:
        with suppress(ImportError, OSError, AttributeError):
            importlib.import_module(module)
