"""Where a stored model comes from: what it read, what it began with, which version it is, who moved its aliases."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from mlenv.config import CONFIG_FILE
from mlenv.datasets.statistics import STATISTICS_FILE, Statistics, read_statistics
from mlenv.errors import MlenvError
from mlenv.inference.stored_model import fingerprint_of
from mlenv.loops.training_run import PROGRESS
from mlenv.models.registration import CHECKPOINT_TAG, lineage
from mlenv.models.registry import ModelVersion, RegisteredModel, Registry, list_versions
from mlenv.records.dataset_record import DATASET_FILE, DatasetRecord, read_dataset_record
from mlenv.records.mlflow_outbox import known_uri, load_record
from mlenv.records.mlflow_store import asking, store_uri

logger = logging.getLogger(__name__)

_MODEL: Final = re.compile(r"models:/([^/@]+)[@/]([^/@]+)")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of where a model comes from; None and empty where it is not."""

    config: Mapping[str, Any]
    """As composed."""
    step: int
    fingerprint: str
    """Of the checkpoint."""
    record: DatasetRecord | None
    """Of what the training read."""
    statistics: Statistics | None
    """Of its training rows."""
    version: ModelVersion | None
    registered: RegisteredModel | None
    lineage: Mapping[str, str]
    """Teacher and warm start, as the config names them, and as versions."""
    run_id: str
    """In MLflow; empty where it is in none."""
    uri: str
    """Where MLflow is."""
    facts: Mapping[str, str]
    """What the training said of itself: revision, versions of what computes, windows."""


def find_origin(name: str, checkpoint: Path, uri: str = "") -> Origin:
    """
    Args:
        name: what led to the checkpoint: an output folder, a checkpoint or a model that MLflow keeps.
        uri: where MLflow is; otherwise where the training is tracked, if it is.

    Raises:
        MlenvError: a model that MLflow keeps is asked for, and it does not answer.
    """
    config: Any = OmegaConf.to_container(OmegaConf.load(checkpoint / CONFIG_FILE))
    progress = json.loads((checkpoint / PROGRESS).read_text())
    fingerprint, fingerprints = fingerprint_of(checkpoint), progress.get("fingerprints", {})
    output = next((folder for folder in (Path(name), *Path(name).absolute().parents) if (folder / DATASET_FILE).is_file()), None)
    tracked = load_record(output) if output is not None and ":/" not in name else None
    run, version, registered, origins = tracked.run_id if tracked else "", None, None, {}
    place = store_uri(uri) if uri or tracked is None else known_uri(tracked.uri)
    if ":/" in name or tracked is not None:
        try:
            registry = Registry(place)
            version = _version(registry, name, fingerprint)
            registered = registry.model(version.name) if version is not None else None
            origins = dict(lineage(config, fingerprints, registry))
        except MlenvError as error:
            if ":/" in name:
                raise
            logger.warning("the model's versions are not told: %s", error)
    origins = origins or dict(lineage(config, fingerprints, None))
    run = run or (version.run_id if version is not None else "")
    with tempfile.TemporaryDirectory() as folder:
        files = output if output is not None and ":/" not in name else _download(place, run, Path(folder)) if run else Path(folder)
        return Origin(
            config=config,
            step=int(progress["step"]),
            fingerprint=fingerprint,
            record=read_dataset_record(files / DATASET_FILE) if (files / DATASET_FILE).is_file() else None,
            statistics=read_statistics(files / STATISTICS_FILE) if (files / STATISTICS_FILE).is_file() else None,
            version=version,
            registered=registered,
            lineage=origins,
            facts=_facts(version.tags if version is not None else tracked.tags if tracked else {}),
            run_id=run,
            uri=place,
        )


def _facts(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags that people want to read: neither figures nor what others keep among them."""
    return {name: text for name, text in tags.items() if "/" not in name and not name.startswith(("mlflow.", "mlenv."))}


def _version(registry: Registry, name: str, fingerprint: str) -> ModelVersion | None:
    """The version that is named, or the newest one that has this checkpoint."""
    if named := _MODEL.fullmatch(name):
        return registry.version(named[1], named[2])
    with asking(registry.uri):
        found = [one for one in list_versions(registry.client) if one.tags.get(CHECKPOINT_TAG) == fingerprint]
    return max(found, key=lambda one: one.created_ms, default=None)


def _download(uri: str, run: str, folder: Path) -> Path:
    client = Registry(uri).client
    with asking(uri, run):
        for file in {DATASET_FILE, STATISTICS_FILE} & {file.path for file in client.list_artifacts(run)}:
            client.download_artifacts(run, file, str(folder))
    return folder
