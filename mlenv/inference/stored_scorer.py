"""A stored model, ready to score rows: read, built and calibrated as it was when it was trained."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mlenv.batch import Batch, Extra
from mlenv.config import CALIBRATORS, CalibratorConfig, ChecksConfig, DataConfig, GatesConfig, LoopConfig, WindowConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.errors import ConfigError
from mlenv.inference.stored_model import MLFLOW_SCHEMES, ModelSections, build_stored_model, find_checkpoint, fingerprint_of, read_sections
from mlenv.kinds import kind_field
from mlenv.loops.calibration import CALIBRATORS_FILE, Calibrator, calibrators_from_json, predictions_from
from mlenv.loops.checkpoint import read_document, verify
from mlenv.records.mlflow_store import open_store, store_uri
from mlenv.schema import Schema


@dataclass(frozen=True, kw_only=True)
class ScoringSections:
    """What of a checkpoint's config says how rows are read for its model, and what they are held to."""

    data: DataConfig
    name: str = ""
    """Of the experiment."""
    calibration: dict[str, CalibratorConfig] = kind_field(CALIBRATORS, default_factory=dict)
    loop: LoopConfig = LoopConfig()
    checks: ChecksConfig = ChecksConfig()
    gates: GatesConfig = GatesConfig()


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The rows that a model is asked about."""

    path: str
    window: WindowConfig


class StoredScorer:
    """A checkpoint that gives predictions, read and calibrated as it was when it was trained.

    Raises:
        CheckpointError: it is damaged.
        Problems: its config is of another version of mlenv.
    """

    def __init__(self, checkpoint: Path) -> None:
        verify(checkpoint)
        self.sections = read_sections(checkpoint, ScoringSections)
        model = read_sections(checkpoint, ModelSections)
        self.schema: Schema = model.schema
        self.fingerprint = fingerprint_of(checkpoint)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: nn.Module = build_stored_model(checkpoint, model, self.device)
        text = read_document(checkpoint, CALIBRATORS_FILE)
        place = f"{checkpoint}, {CALIBRATORS_FILE}"
        self.calibrators: dict[str, Calibrator] = {} if text is None else calibrators_from_json(text, self.sections.calibration, place)
        precision = self.sections.loop.precision
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16-mixed")

    @property
    def num_bytes(self) -> int:
        """Of parameters and buffers."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def replica(self) -> StoredScorer:
        """Another one over the same weights, for another thread: a model may keep what it computes on the way in itself."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return deepcopy(self, {id(shared): shared for shared in (*tensors, self.schema, self.sections)})

    def source(self, rows: HeldOut, passed_through: Schema | None = None, *, has_labels: bool = True) -> ParquetSource:
        """The rows as this model reads them.

        Args:
            passed_through: whose row key, request and segments the rows carry, beside this model's own segments.
            has_labels: whether the labels are read. Without, their columns need not be there.
        """
        schema = self.schema
        if passed_through is not None:
            segments = tuple(dict.fromkeys([*passed_through.segments, *schema.segments]))
            schema = replace(schema, row_key=passed_through.row_key, request=passed_through.request, segments=segments)
        data = replace(self.sections.data, path=rows.path, allow_missing_days=True)
        extras: tuple[Extra, ...] = ("metadata",)
        return ParquetSource(data, rows.window, schema, extras=extras, has_labels=has_labels)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Predictions ``(batch, tasks)`` float32, on the host."""
        with self._autocast:
            logits = self.model(batch.to(self.device)).float()
        return predictions_from(logits, batch.metadata, self.schema.tasks, self.calibrators).cpu()


def open_scorer(name: str, tracking_uri: str = "", key: str = "MODEL") -> StoredScorer:
    """
    Args:
        name: an output folder, a checkpoint, or a model that MLflow keeps; what is downloaded does not stay.
        key: of the name, for messages.

    Raises:
        ConfigError: there is no such model.
        DataError: there is no database of tracked runs.
        CheckpointError: it is damaged.
    """
    if name.startswith(MLFLOW_SCHEMES):
        open_store(store_uri(tracking_uri))  # where there is none, the look-up would make one
    with tempfile.TemporaryDirectory() as folder:
        return StoredScorer(find_checkpoint(name, store_uri(tracking_uri), key, Path(folder)))


def rows_for(scorer: StoredScorer, path: str = "", start: str = "", end: str = "") -> HeldOut:
    """The rows that are named; the test window that the model was trained with, if nothing is.

    Args:
        path: of a data set or of files; otherwise that of the training.
        start: first day as YYYY-MM-DD; empty for the earliest.
        end: last day; empty for the latest.

    Raises:
        ConfigError: the model was trained without a test window, and nothing is named.
    """
    data = scorer.sections.data
    if path or start or end:
        return HeldOut(path=path or data.path, window=WindowConfig(start=start, end=end))
    if data.test is None:
        fix = "name a path, or the first and the last day"
        raise ConfigError("rows", expected="a test window in the model's config, or rows that are named", received=None, fix=fix)
    return HeldOut(path=data.path, window=data.test)
