"""Finds the checkpoint that a model's name leads to: on the disk, or in MLflow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from mlenv.errors import ConfigError
from mlenv.loops.checkpoint import MANIFEST, list_checkpoints
from mlenv.loops.training_run import BEST_FOLDER, CHECKPOINT_FOLDER
from mlenv.mlflow_outbox import absolute_uri

_MLFLOW = ("runs:/", "models:/", "mlflow-artifacts:/")


def find_checkpoint(name: str, tracking_uri: str, key: str) -> Path:
    """Of a training that chose its best step that one, of another its last.

    Args:
        name: an output folder, a checkpoint, or a model that MLflow keeps.
        key: of the config, for the message.

    Raises:
        ConfigError: there is none.
    """
    folder = _download(name, tracking_uri, key) if name.startswith(_MLFLOW) else Path(name)
    if (folder / MANIFEST).is_file():
        return folder
    checkpoints = list_checkpoints(folder / BEST_FOLDER) or list_checkpoints(folder / CHECKPOINT_FOLDER)
    checkpoints = checkpoints or [path.parent for path in folder.glob(f"*/{MANIFEST}")]
    if not checkpoints:
        fix = "name the output folder of a training, one of its checkpoints, or a model that MLflow keeps"
        raise ConfigError(key, expected="a checkpoint", received=name, fix=fix)
    return checkpoints[-1]


def fingerprint_of(checkpoint: Path) -> str:
    """Of all that a checkpoint holds."""
    return xxhash.xxh3_128((checkpoint / MANIFEST).read_bytes()).hexdigest()[:12]


def _download(uri: str, tracking_uri: str, key: str) -> Path:
    import mlflow

    with _mlflow_at(absolute_uri(tracking_uri)):
        try:
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise ConfigError(key, expected="a model that MLflow keeps", received=uri, fix=str(error).partition("\n")[0]) from error


@contextmanager
def _mlflow_at(uri: str) -> Iterator[None]:
    """Models of a registry are looked up where MLflow is set to be, and it writes that to the environment too: a later training
    of this process must not be tracked there."""
    import mlflow

    set_before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else ""  # type: ignore[no-untyped-call]
    environment = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(set_before)
        if environment is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = environment
