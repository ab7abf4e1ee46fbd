"""A trained model that teaches another one: found, checked against the student, frozen, scored batch by batch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mlenv.batch import Batch, SparseFeatures
from mlenv.config import DistillationConfig
from mlenv.errors import ConfigError
from mlenv.inference.stored_model import ModelSections, build_stored_model, find_checkpoint, fingerprint_of, read_sections
from mlenv.loops.calibration import CALIBRATORS_FILE, Calibrator, calibrators_from_json
from mlenv.loops.checkpoint import read_document, verify
from mlenv.modules.distillation import Taught, Teach
from mlenv.modules.shared_input import WatchedInput
from mlenv.schema import Schema, Table

KEY = "objective.distillation.teacher"


class Teacher:
    """Gives a checkpoint's logits for batches that were encoded for another schema.

    The teacher may read fewer features than the student, and have tables of other widths and poolings; the features that it
    reads must be encoded alike. It has no gradient, and no tensor of it is part of the student's checkpoints.

    Raises:
        ConfigError: there is no such checkpoint, or it was trained for another schema or for none of the student's tasks.
        CheckpointError: it is damaged.
    """

    def __init__(self, config: DistillationConfig, schema: Schema, device: torch.device, *, tracking_uri: str) -> None:
        checkpoint = find_checkpoint(config.teacher, tracking_uri, KEY)
        verify(checkpoint)
        self.fingerprint = fingerprint_of(checkpoint)
        """Of the checkpoint; a student that goes on must have the same teacher."""
        taught = read_sections(checkpoint, ModelSections)
        _check_same_reading(taught.schema, schema, config.teacher)
        self._model = build_stored_model(checkpoint, taught, device)
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16-mixed")
        self._hidden = None
        if config.hidden is not None:
            self._hidden = WatchedInput(self._model, config.hidden.teacher_part, "objective.distillation.hidden.teacher_part")
        self._calibrators: dict[int, nn.Module] = {}
        """Of the columns of its logits that are calibrated."""
        if config.calibrated:
            calibrators = _calibrators(checkpoint)
            self._calibrators = {taught.schema.tasks.index(task): one.module.to(device) for task, one in calibrators.items()}
        self._view = _View(schema, taught.schema, device)
        tasks = [taught.schema.tasks.index(task) if task in taught.schema.tasks else -1 for task in schema.tasks]
        self._tasks = torch.tensor(tasks, device=device)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Taught:
        """
        Args:
            batch: encoded for the student's schema, on the teacher's device.
        """
        with self._autocast:
            found = self._model(self._view.of(batch)).float()
        for column, calibrator in self._calibrators.items():
            found[:, column] = torch.logit(calibrator(found[:, column]))
        nothing = found.new_full((len(found), 1), torch.nan)
        logits = torch.cat([found, nothing], dim=1)[:, self._tasks]
        return Taught(logits, None if self._hidden is None else self._hidden.take())


def teacher_of(config: DistillationConfig | None, schema: Schema, device: torch.device, tracking_uri: str) -> Teach | None:
    """What a config learns from, ready to be asked; None without a distillation.

    Raises:
        ConfigError, CheckpointError: see Teacher.
    """
    if config is None:
        return None
    return Teacher(config, schema, device, tracking_uri=tracking_uri) if config.teacher else teacher_columns


def teacher_columns(batch: Batch) -> Taught:
    """What the columns say that ``schema.labels.TASK.teacher`` names: probabilities, taken back to logits."""
    assert batch.teacher is not None, "the source was not asked for the teacher's columns"
    return Taught(torch.logit(batch.teacher, eps=1e-6))


class _View:
    """The part of a batch that the teacher reads, in the teacher's order."""

    def __init__(self, student: Schema, teacher: Schema, device: torch.device) -> None:
        places = {key.name: place for place, key in enumerate(student.sparse_keys)}
        self._keys = [places[key.name] for key in teacher.sparse_keys]
        starts = {column.name: column.start for column in student.dense_columns}
        dense = [starts[column.name] + place for column in teacher.dense_columns for place in range(column.width)]
        self._dense = torch.tensor(dense, dtype=torch.long, device=device)
        self._is_same = self._keys == list(range(len(student.sparse_keys))) and dense == list(range(student.num_dense))

    def of(self, batch: Batch) -> Batch:
        if self._is_same:
            return batch
        return replace(batch, sparse=_chosen(batch.sparse, self._keys), dense=batch.dense[:, self._dense])


def _chosen(sparse: SparseFeatures, keys: list[int]) -> SparseFeatures:
    parts = [sparse.select(key, key + 1) for key in keys]

    def joined(tensors: list[Tensor], like: Tensor) -> Tensor:
        return torch.cat(tensors) if tensors else like[:0]

    return SparseFeatures(
        tuple(part.keys[0] for part in parts),
        joined([part.values for part in parts], sparse.values),
        joined([part.lengths for part in parts], sparse.lengths),
        tuple(part.value_counts[0] for part in parts),
        None if sparse.weights is None else joined([part.weights for part in parts if part.weights is not None], sparse.weights),
    )


def _calibrators(checkpoint: Path) -> dict[str, Calibrator]:
    """The teacher's calibrators, all of which must do with its logits: training rows carry no segments."""
    text = read_document(checkpoint, CALIBRATORS_FILE)
    found = {} if text is None else calibrators_from_json(text, {}, f"{checkpoint}, {CALIBRATORS_FILE}")
    by_segment = [task for task, calibrator in found.items() if calibrator.segments]
    if by_segment or not found:
        received = f"{checkpoint}: {f'{by_segment} are calibrated by segment' if by_segment else 'no calibrator'}"
        fix = "set it to false; the teacher's own logits teach more anyway"
        raise ConfigError(
            "objective.distillation.calibrated",
            expected="a teacher with calibrators that read its logits alone",
            received=received,
            fix=fix,
        )
    return found


def _check_same_reading(teacher: Schema, student: Schema, name: str) -> None:
    """Refuses a teacher that would read other ids and numbers than it was trained on."""
    if not set(teacher.tasks) & set(student.tasks):
        raise ConfigError(KEY, expected=f"a teacher of one of the tasks {list(student.tasks)}", received=f"{name}: {list(teacher.tasks)}")
    differences = [f"features.{feature}: the student has none" for feature in teacher.features if feature not in student.features]
    if not differences:
        features = {feature: student.features[feature] for feature in teacher.features}
        read = replace(teacher, tables=_used(teacher, teacher.features.keys()))
        differences = read.differences(replace(teacher, features=features, tables=_used(student, teacher.features.keys())))
    if differences:
        fix = "train the teacher on the student's schema, or write its predictions to a column and name that in schema.labels.TASK.teacher"
        raise ConfigError(
            KEY, expected="a teacher whose features the student reads alike", received=f"{name}: {'; '.join(differences)}", fix=fix
        )


def _used(schema: Schema, features: Collection[str]) -> dict[str, Table]:
    """Tables of these features, all of one width and pooling: neither changes which rows are read."""
    used = {key.table for key in schema.sparse_keys if key.feature in features}
    return {name: replace(table, embedding_dim=1, pooling="sum") for name, table in schema.tables.items() if name in used}
