"""From the output folder of a training to a version of a registered model, with all that tells where it comes from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from mlenv.config import CONFIG_FILE
from mlenv.datasets.statistics import STATISTICS_FILE
from mlenv.errors import DataError
from mlenv.inference.stored_model import find_checkpoint, fingerprint_of
from mlenv.loops.checkpoint import MANIFEST, verify
from mlenv.loops.training_run import PROGRESS
from mlenv.models.registry import CHALLENGER, CHAMPION, ModelVersion, Registry, list_versions
from mlenv.records.mlflow_outbox import known_uri
from mlenv.records.mlflow_store import asking
from mlenv.records.tracking import tracked_run
from mlenv.training import METRICS

CHECKPOINT_TAG: Final = "checkpoint fingerprint"
"""By it a version is found again, as the teacher of another or as what it began with."""

_FOLDER: Final = "model"
"""Of the run, that the training puts its checkpoint in."""


@dataclass(frozen=True, kw_only=True)
class Registered:
    """What ``register`` did."""

    version: ModelVersion
    is_new: bool
    """False for a checkpoint that has been registered before."""


def register(output: Path, name: str, uri: str = "") -> Registered:
    """Makes the model that a training kept a version of a registered model, and the challenger.

    Args:
        output: folder of a finished, tracked training.
        uri: where MLflow is; that of the run when empty.

    Raises:
        DataError: the training is not tracked, has not ended, or MLflow has not got all of it yet.
        CheckpointError: the checkpoint is damaged.
        MlenvError: MLflow does not answer.
    """
    run = tracked_run(output)
    checkpoint = find_checkpoint(str(output), "", "OUTPUT")
    verify(checkpoint)
    registry = Registry(uri or known_uri(run.uri))
    send = f"mlenv runs send '{output}', when the training has ended"
    if not run.run_id or run.artifacts or run.status != "FINISHED":
        received = f"{run.status}, {len(run.artifacts)} files not sent yet" if run.run_id else "a run that MLflow has not got"
        raise DataError(str(output), expected="a training that has ended and that MLflow has all of", received=received, fix=send)
    client, fingerprint = registry.client, fingerprint_of(checkpoint)
    with asking(registry.uri, f"run {run.run_id}", what="the run of this training"):
        kept = client.get_run(run.run_id)
        _check_kept(client, run.run_id, checkpoint, send)
        tags = {key: value for key, value in kept.data.tags.items() if not key.startswith(("mlflow.", "mlenv."))}
        tags |= _tags(output, checkpoint, fingerprint, registry)
        known = {one.tags.get(CHECKPOINT_TAG): one for one in list_versions(client, name) if one.run_id == run.run_id}
        if (version := known.get(fingerprint)) is None:
            _make_sure_of(registry, name)
            source = f"{kept.info.artifact_uri}/{_FOLDER}/{checkpoint.name}"
            number = str(client.create_model_version(name, source, run_id=run.run_id, tags=tags, await_creation_for=0).version)
        else:
            number = version.version
        if version is None or CHAMPION not in version.aliases:
            client.set_registered_model_alias(name, CHALLENGER, number)
    return Registered(version=registry.version(name, number), is_new=version is None)


def _check_kept(client: Any, run_id: str, checkpoint: Path, fix: str) -> None:
    """MLflow has this very checkpoint, and what the gates read beside it."""
    held = {file.path for file in client.list_artifacts(run_id)}
    if missing := {CONFIG_FILE, STATISTICS_FILE} - held:
        raise DataError(f"run {run_id}", expected=f"a run with {', '.join(sorted(missing))}", received=sorted(held), fix=fix)
    place = f"{_FOLDER}/{checkpoint.name}"
    if f"{place}/{MANIFEST}" not in {file.path for file in client.list_artifacts(run_id, place)}:
        raise DataError(f"run {run_id}", expected=f"the checkpoint {place}", received="no such files", fix=fix)
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(client.download_artifacts(run_id, f"{place}/{MANIFEST}", folder)).read_bytes()
    if manifest != (checkpoint / MANIFEST).read_bytes():
        fix = "run mlenv train again: a complete training sends its checkpoint anew"
        raise DataError(f"run {run_id}", expected=f"the checkpoint as it is in {checkpoint}", received="another one", fix=fix)


def _tags(output: Path, checkpoint: Path, fingerprint: str, registry: Registry) -> dict[str, str]:
    """What a version says of itself beside the facts of its run: figures, image, and whom it comes from."""
    config: Any = OmegaConf.to_container(OmegaConf.load(checkpoint / CONFIG_FILE))
    progress = json.loads((checkpoint / PROGRESS).read_text())
    tags = {CHECKPOINT_TAG: fingerprint, "name": str(config["name"]), "step": str(progress["step"])}
    file = output / METRICS
    figures = json.loads(file.read_text()) if file.exists() else {}
    tags |= {f"test/{key}": f"{value:.6g}" for key, value in figures.items() if value is not None and "@" not in key}
    if image := (config.get("job") or {}).get("image"):
        tags["image"] = str(image)
    return tags | dict(lineage(config, progress.get("fingerprints", {}), registry))


def lineage(config: Mapping[str, Any], fingerprints: Mapping[str, str], registry: Registry | None) -> Iterator[tuple[str, str]]:
    """The teacher, and what the training began with: as the config names them, and as versions where they are registered.

    Args:
        fingerprints: of their checkpoints, by role, as the progress of the training has them.
    """
    distillation = (config.get("objective") or {}).get("distillation") or {}
    named = {"teacher": distillation.get("teacher"), "warm start": (config.get("warm_start") or {}).get("checkpoint")}
    for role, checkpoint in named.items():
        if not checkpoint:
            continue
        yield role, str(checkpoint)
        mine = fingerprints.get(role, "")
        versions = list_versions(registry.client) if registry is not None and mine else ()
        if found := [one for one in versions if one.tags.get(CHECKPOINT_TAG) == mine]:
            yield f"{role} version", f"models:/{found[0].name}/{found[0].version}"


def _make_sure_of(registry: Registry, name: str) -> None:
    if name not in registry.models():
        registry.client.create_registered_model(name)
