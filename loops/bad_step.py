"""A step whose loss was no number or too large, kept so that it can be run again.

``bad_step-NNNNNNNN/``, by the number of the step:

- ``step-NNNNNNNN/``: model, optimizers and random state before the step, the config and the progress, as a checkpoint
- ``batch-rank0.safetensors``: the batch, as the source gave it
- ``statistics-rank0.json``: what the step computed, module by module
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mlenv.batch import Batch, Position, SparseFeatures
from mlenv.errors import CheckpointError
from mlenv.loops.checkpoint import list_checkpoints, save_checkpoint
from mlenv.loops.ranks import rank
from mlenv.loops.step_statistics import StepStatistics

KEPT_STEPS: Final = 3
"""Bad steps whose folders stay; each is as large as a checkpoint."""

_NAME = re.compile(r"bad_step-\d{8}")
_DENSE = ("dense", "labels", "weights", "requests", "teacher")


def bad_step_folder(output: Path, step: int) -> Path:
    """Where the step is kept."""
    return output / f"bad_step-{step:08d}"


def save_bad_step(
    folder: Path, step: int, tensors: Mapping[str, Any], documents: Mapping[str, str], batch: Batch, statistics: StepStatistics
) -> None:
    """Writes what is needed to run a step again, and removes all but the newest folders of this kind beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_batch(batch, folder / f"batch-rank{rank()}.safetensors")
        (folder / f"statistics-rank{rank()}.json").write_text(statistics.to_json())
        save_checkpoint(folder, step, tensors, documents)  # last: without it there is no bad step to run again
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)  # on a full disk a part of it helps nobody
        raise
    kept = sorted(path for path in folder.parent.iterdir() if _NAME.fullmatch(path.name))
    for old in kept[:-KEPT_STEPS] if rank() == 0 else ():
        shutil.rmtree(old)


def bad_step_checkpoint(folder: Path) -> Path:
    """The state before the step.

    Raises:
        CheckpointError: the folder holds no bad step.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        fix = "name a folder bad_step-NNNNNNNN in the output folder of a training"
        raise CheckpointError(str(folder), expected="a bad step", received="no checkpoint", fix=fix)
    return checkpoints[-1]


def save_batch(batch: Batch, file: Path) -> None:
    """Writes all of a batch but its metadata."""
    tensors: dict[str, Tensor] = {name: part for name in _DENSE if (part := getattr(batch, name)) is not None}
    sparse = batch.sparse
    tensors |= {"sparse.values": sparse.values, "sparse.lengths": sparse.lengths}
    tensors |= {} if sparse.weights is None else {"sparse.weights": sparse.weights}
    about = {"keys": sparse.keys, "value_counts": sparse.value_counts, "position": asdict(batch.position)}
    temporary = file.with_name(f".{file.name}.part")
    own = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}  # they may share memory
    temporary.write_bytes(save(own, {"batch": json.dumps(about)}))
    temporary.replace(file)


def load_batch(file: Path) -> Batch:
    """A batch as it was written."""
    with safe_open(file, framework="pt") as stored:
        about = json.loads(stored.metadata()["batch"])
        tensors: dict[str, Tensor] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    ids = {name: tensors.pop(f"sparse.{name}", None) for name in ("values", "lengths", "weights")}
    assert ids["values"] is not None
    assert ids["lengths"] is not None
    sparse = SparseFeatures(tuple(about["keys"]), ids["values"], ids["lengths"], tuple(about["value_counts"]), ids["weights"])
    return Batch(sparse=sparse, position=Position(**about["position"]), **tensors)
