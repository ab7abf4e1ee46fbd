"""Finds the checkpoint that a model's name leads to, on the disk or in MLflow, and builds the model that it holds."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from omegaconf import OmegaConf
from torch import nn

from mlenv.composition import from_plain
from mlenv.config import MODELS, EmbeddingsConfig, ModelConfig
from mlenv.errors import ConfigError
from mlenv.kinds import kind_field
from mlenv.loops.checkpoint import MANIFEST, list_checkpoints, load_tensors
from mlenv.loops.training_run import BEST_FOLDER, CHECKPOINT_FOLDER, CONFIG
from mlenv.loops.training_state import model_tensors
from mlenv.modules import TorchEmbeddings
from mlenv.records.mlflow_outbox import absolute_uri
from mlenv.schema import Schema

Sections = TypeVar("Sections")

MLFLOW_SCHEMES = ("runs:/", "models:/", "mlflow-artifacts:/")


def find_checkpoint(name: str, tracking_uri: str, key: str, into: Path | None = None) -> Path:
    """Of a training that chose its best step that one, of another its last.

    Args:
        name: an output folder, a checkpoint, or a model that MLflow keeps.
        key: of the config, for the message.
        into: a folder for what is downloaded; by default one that goes when this process ends.

    Raises:
        ConfigError: there is none.
    """
    folder = _download(name, tracking_uri, key, into) if name.startswith(MLFLOW_SCHEMES) else Path(name)
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


@dataclass(frozen=True, kw_only=True)
class ModelSections:
    """The part of a checkpoint's config that makes its model: a class of its own for anything else need not be there any more."""

    schema: Schema
    model: ModelConfig = kind_field(MODELS)
    embeddings: EmbeddingsConfig = EmbeddingsConfig()


def read_sections(checkpoint: Path, cls: type[Sections]) -> Sections:
    """The sections of a checkpoint's config that a dataclass has fields for.

    Raises:
        Problems: they are of another version of mlenv.
    """
    plain = OmegaConf.to_container(OmegaConf.load(checkpoint / CONFIG))
    assert isinstance(plain, dict)
    parts: dict[str, Any] = {item.name: plain[item.name] for item in fields(cls) if item.name in plain}  # type: ignore[arg-type]
    sections: Sections = from_plain(parts, cls, str(checkpoint / CONFIG))
    return sections


def build_stored_model(checkpoint: Path, sections: ModelSections, device: torch.device) -> nn.Module:
    """The model of a verified checkpoint, to be asked and not to be trained, its tables on plain PyTorch whatever trained them."""
    with torch.random.fork_rng(devices=[]):
        model = sections.model.build(sections.schema, TorchEmbeddings(sections.schema, sections.embeddings, seed=0))
    load_tensors(checkpoint, model_tensors(model))
    return model.to(device).eval().requires_grad_(False)


def _download(uri: str, tracking_uri: str, key: str, into: Path | None) -> Path:
    import mlflow

    if into is None:
        into = Path(tempfile.mkdtemp(prefix="mlenv-model-"))
        atexit.register(shutil.rmtree, into, ignore_errors=True)
    with _mlflow_at(absolute_uri(tracking_uri)):
        try:
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(into)))
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
