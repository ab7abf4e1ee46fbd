"""Whether a training may go on from a checkpoint: what of the config may be another by then, and what may not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mlenv.composition import from_plain, leaves, to_plain
from mlenv.config import ExperimentConfig
from mlenv.errors import CheckpointError
from mlenv.loops.ranks import world_size
from mlenv.loops.training_run import PROGRESS
from mlenv.schema import Schema

logger = logging.getLogger(__name__)

_MAY_CHANGE = (
    *("name", "output", "tracking.", "checks.", "gates.", "calibration.", "data.path", "data.test", "data.workers.", "launch.", "job."),
    *("loop.log_every_steps", "loop.checkpoint_every_steps", "loop.keep_checkpoints", "loop.stop_after_evaluations", "loop.device"),
    *("loop.compile", "loop.read_ahead", "loop.peak_tflops", "loop.profile_steps"),
    *("loop.on_bad_loss", "loop.max_loss", "loop.max_skipped_steps", "loop.hang_timeout_seconds", "loop.keep_every_steps"),
    "loop.checkpoint_url",
    "data.content_hash",
    "loop.strategy",
    "embeddings.sharding",
)
"""Keys that a resumed training may set anew; any other would make it another model."""

_LENGTH = ("loop.max_steps", "data.num_epochs")
"""Keys that a resumed training may set anew unless the learning rate follows from them."""

_VALIDATION = ("data.validation", "loop.evaluate_every_steps")
"""Keys that a resumed training may set anew unless the best step is chosen by them."""


def check_schema(checkpoint: Path, text: str, schema: Schema) -> None:
    """Refuses a checkpoint that was trained on another schema.

    Args:
        text: its config.

    Raises:
        CheckpointError: names the differences by feature.
    """
    differences = from_plain(_plain(text)["schema"], Schema, str(checkpoint)).differences(schema)
    if differences:
        fix = "use the config it was trained with, or train in another output folder"
        raise CheckpointError(f"{checkpoint}, schema", expected="the schema it was trained with", received="; ".join(differences), fix=fix)


def check_resumable(config: ExperimentConfig, checkpoint: Path, text: str) -> None:
    """Refuses to go on from a checkpoint of another experiment.

    Args:
        text: config of the checkpoint.

    Raises:
        CheckpointError: names the features or the keys that are others now.
    """
    check_schema(checkpoint, text, config.schema)
    saved = _plain(text)
    before, now = leaves(saved), leaves(to_plain(config))
    loop, taught = config.loop, config.objective.distillation
    follows_length = loop.learning_rate_decay in ("linear", "cosine") or (taught is not None and taught.final_weight is not None)
    may_change = _MAY_CHANGE + (() if follows_length else _LENGTH) + (() if loop.monitor else _VALIDATION)
    progress = checkpoint / PROGRESS  # not there yet where the checkpoint is still to be fetched
    num_before = len(json.loads(progress.read_text())["position"]) if progress.exists() else 0
    if num_before != world_size():  # which may keep the examples of a step, over all ranks, or take the chance to change them
        may_change += ("data.batch_size",)
        if num_before and (total := num_before * before["data.batch_size"]) != (total_now := world_size() * now["data.batch_size"]):
            logger.warning("a step had %d examples over %d processes, and has %d over %d now", total, num_before, total_now, world_size())
    changed = [
        f"{key}: {before.get(key)!r} became {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key) and not key.startswith(("schema.", *may_change)) and not _divides_a_table(key)
    ]
    if changed:
        fix = "put them back, or train in another output folder"
        raise CheckpointError(f"{checkpoint}, config", expected="the values it was trained with", received="; ".join(changed), fix=fix)


def _divides_a_table(key: str) -> bool:
    return key.startswith("embeddings.tables.") and key.endswith(".sharding")


def _plain(text: str) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]
