"""Writes a trained model as a package that is served without TorchRec, Ray and MLflow, and compares it with the trainer."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from mlenv.batch import Extra
from mlenv.composition import compose, to_yaml
from mlenv.config import ExperimentConfig, WindowConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.errors import ConfigError, GateError
from mlenv.inference.stored_model import find_checkpoint, fingerprint_of
from mlenv.inference.stored_scorer import HeldOut
from mlenv.loops.calibration import CALIBRATORS_FILE, Calibrator, calibrators_from_json
from mlenv.loops.checkpoint import load_tensors, read_document, verify
from mlenv.loops.training_run import CONFIG
from mlenv.loops.training_state import model_tensors
from mlenv.modules import TorchEmbeddings
from mlenv.modules.served_embeddings import TABLE_TYPES, ServedEmbeddings, TableType
from mlenv.records.tracking import run_tags
from mlenv.schema import Schema
from mlenv.serving.columns import plain_type, served_columns
from mlenv.serving.graph import ServedGraph
from mlenv.serving.inputs import PADDING_ROWS, input_names
from mlenv.serving.mlflow_model import write_mlflow_model
from mlenv.serving.onnx_graph import refused, without_chatter, write_onnx
from mlenv.serving.package import FORMATS, GRAPHS, PACKAGE, PARITY, SCHEMA, Format, Package, open_package, write_manifest
from mlenv.serving.parity import TOLERANCE, Parity, compare
from mlenv.serving.row_transforms import ServedPlan, ServedTransforms, columns_before, keeping, plan_serving

logger = logging.getLogger(__name__)

_EXTRAS: tuple[Extra, ...] = ("metadata",)
_MAY_JUMP = ("histogram", "isotonic")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    out: Path
    """New folder of the package, or one that holds a package."""
    formats: tuple[Format, ...] = ("onnx",)
    """Of the numeric graph."""
    tables: TableType = "float32"
    """How the rows of embedding tables are stored."""
    tracking_uri: str = ""
    """Where MLflow is, for a model that it keeps."""
    overrides: tuple[str, ...] = ()
    """Keys of the config that are otherwise here than where the model was trained, such as ``data.path``."""

    def __post_init__(self) -> None:
        if not self.formats or (unknown := [one for one in self.formats if one not in FORMATS]):
            raise ConfigError("--format", expected=f"some of {', '.join(FORMATS)}", received=unknown if self.formats else "none")
        if self.tables not in TABLE_TYPES:
            raise ConfigError("--tables", expected=f"one of {', '.join(TABLE_TYPES)}", received=self.tables)
        if not self.out.parent.is_dir():
            fix = f"mkdir -p '{self.out.parent}'"
            raise ConfigError("--out", expected="a folder whose parent exists", received=str(self.out), fix=fix)
        if self.out.exists() and not (self.out / PACKAGE).is_file():
            raise ConfigError("--out", expected="a new folder, or one of a package", received=str(self.out), fix="name another folder")


@dataclass(frozen=True)
class Trained:
    """A checkpoint as a model on plain PyTorch tables, whichever engine trained it."""

    checkpoint: Path
    config: ExperimentConfig
    model: nn.Module
    calibrators: dict[str, Calibrator] = field(default_factory=dict)


def export(name: str, options: ExportOptions, rows: HeldOut | None = None) -> tuple[Package, Parity]:
    """
    Args:
        name: an output folder, a checkpoint, or a model that MLflow keeps.
        rows: to compare on; otherwise the test window of the model's config, or what there is.

    Raises:
        ConfigError: there is no such model, or it cannot be exported; the message names the operator.
        GateError: with float32 tables a prediction differs from the trainer's by more than ``TOLERANCE``. No package is written then.
    """
    trained = load_trained(name, options)
    data = trained.config.data
    window = measured_window(trained.config) if rows is None else rows.window
    written = written_predictions(trained) if rows is None else None
    if rows is not None:
        data = replace(data, path=rows.path, allow_missing_days=True)
    plan = serving_plan(trained)
    for name, place in plan.brought.items():
        logger.warning("A request has to bring the column %s: what makes it, data.transforms[%d], is not served.", name, place)
    source = ParquetSource(keeping(data, plan), window, trained.config.schema, extras=_EXTRAS)
    temporary = options.out.with_name(f".{options.out.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        package = _write(trained, plan, source, options, temporary)
        parity = compare(trained.model, trained.calibrators, package, source, str(window), written)
        if options.tables == "float32" and not all(one <= TOLERANCE for one in parity.differences.values()):  # nan is not
            raise GateError(_not_the_model(parity, trained.calibrators))
        (temporary / PARITY).write_text(parity.to_json(), encoding="utf-8")
        _complete(temporary, package)
        shutil.rmtree(options.out, ignore_errors=True)
        temporary.rename(options.out)
    finally:
        source.close()
        shutil.rmtree(temporary, ignore_errors=True)
    return open_package(options.out), parity


def _not_the_model(parity: Parity, calibrators: Mapping[str, Calibrator]) -> str:
    worst = max(parity.differences.values())
    where = "; ".join(f"{form}: {difference:.2e}, {parity.rows_apart[form]} rows" for form, difference in parity.differences.items())
    text = f"the package is not the model: a prediction differs by {worst:.2e}, more than {TOLERANCE:g} ({where})."
    jumping = [f"calibration.{task} ({one.kind})" for task, one in calibrators.items() if one.kind in _MAY_JUMP]
    if jumping:
        text += f" {' and '.join(jumping)} may jump: a logit that is rounded otherwise then moves a prediction far."
        text += " Fix: train again with kind platt, or isotonic with a max_slope."
    return text


def check_export(name: str, options: ExportOptions) -> Path:
    """What a dry run looks at: the checkpoint, which is returned, its config, and the columns of the data.

    Raises:
        ConfigError, CheckpointError, Problems: see export.
    """
    trained = load_trained(name, options)
    serving_plan(trained)
    ParquetSource(trained.config.data, measured_window(trained.config), trained.config.schema, extras=_EXTRAS).close()
    return trained.checkpoint


def load_trained(name: str, options: ExportOptions) -> Trained:
    """
    Raises:
        ConfigError, CheckpointError: there is no such model, it is damaged, or its config no longer composes.
    """
    checkpoint = find_checkpoint(name, options.tracking_uri, "MODEL")
    verify(checkpoint)
    config = compose(checkpoint / CONFIG, options.overrides)
    with torch.random.fork_rng(devices=[]):
        model = config.model.build(config.schema, TorchEmbeddings(config.schema, config.embeddings, seed=0))
    load_tensors(checkpoint, model_tensors(model))
    text = read_document(checkpoint, CALIBRATORS_FILE)
    place = f"{checkpoint}, {CALIBRATORS_FILE}"
    calibrators = {} if text is None else calibrators_from_json(text, config.calibration, place)
    return Trained(checkpoint, config, model.eval().requires_grad_(False), calibrators)


def serving_plan(trained: Trained) -> ServedPlan:
    """How the columns that the model reads come from a request.

    Raises:
        ConfigError: see ``plan_serving``.
    """
    wanted = dict.fromkeys([*trained.config.schema.feature_columns, *_segments_of(trained.calibrators)])
    return plan_serving(trained.config.data.transforms, tuple(wanted))


def measured_window(config: ExperimentConfig) -> WindowConfig:
    """The rows that a package is compared on: the test window, or what there is."""
    return config.data.test or config.data.validation or config.data.train


def written_predictions(trained: Trained) -> Path | None:
    """What the training itself wrote of its test window, where it is beside the checkpoint."""
    folder = trained.checkpoint.parent.parent / "predictions"
    return folder if trained.config.data.test is not None and folder.is_dir() else None


def served_graph(trained: Trained, tables: TableType) -> ServedGraph:
    """The graph that is exported; the model of ``trained`` is left as it is."""
    config = trained.config
    embeddings = TorchEmbeddings(config.schema, config.embeddings, seed=0)
    with torch.random.fork_rng(devices=[]):
        model = config.model.build(config.schema, embeddings)
    model.load_state_dict(trained.model.state_dict())
    served = ServedEmbeddings(embeddings, tables)
    for part in list(model.modules()):
        for name in [name for name, child in part.named_children() if child is embeddings]:
            setattr(part, name, served)
    return ServedGraph(model, config.schema, trained.calibrators).eval().requires_grad_(False)


def trace(graph: ServedGraph, schema: Schema, num_codes: int) -> torch.export.ExportedProgram:
    """The graph as a program for any number of rows and of ids.

    Raises:
        ConfigError: the model does something that cannot be traced.
    """
    keys, rows = schema.sparse_keys, 3 + PADDING_ROWS
    batch = torch.export.Dim("batch", min=2)
    counts: dict[str, Any] = {}
    for place, key in enumerate(keys):
        if key.group != "single":  # the fields of a sequence have as many ids
            counts.setdefault(key.feature, torch.export.Dim(f"ids_{place}", min=2))
    sizes = [{0: batch if key.group == "single" else counts[key.feature]} for key in keys]
    weighted = [place for place, key in enumerate(keys) if key.group == "weighted_bag"]
    per_bag = {feature: 2 + place for place, feature in enumerate(counts)}  # different, so that no two are taken for one
    lengths = [[1 if key.group == "single" else per_bag[key.feature]] * rows for key in keys]
    ids = [torch.zeros(sum(of_key), dtype=torch.int64) for of_key in lengths]
    example = (
        ids,
        torch.tensor(lengths, dtype=torch.int32).view(len(keys), rows),
        [torch.ones(len(ids[place])) for place in weighted],
        torch.zeros(rows, schema.num_dense),
        torch.zeros(rows, num_codes, dtype=torch.int64),
    )
    shapes = (sizes, {1: batch}, [sizes[place] for place in weighted], {0: batch}, {0: batch})
    try:
        with without_chatter():
            return torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise refused(error, "a graph") from error


def _write(trained: Trained, plan: ServedPlan, source: ParquetSource, options: ExportOptions, folder: Path) -> Package:
    config, steps = trained.config, tuple(plan.steps.values())
    segments = {task: dict(calibrator.segments) for task, calibrator in trained.calibrators.items() if calibrator.segments}
    held = columns_before(steps, plan.inputs)
    after = stored_columns(source, [*_segments_of(trained.calibrators), *config.schema.row_key])
    stored = stored_columns(source, list(held.values()))
    known = served_columns(config.schema, _segments_of(trained.calibrators), after)
    types = {name: stored.field(column).type for name, column in held.items()}
    # A column that the features read as it comes has the type that they want; another one that of the log.
    is_plain = {name: held[name] == name and name in known.names for name in held}
    columns = pa.schema([(name, known.field(name).type if is_plain[name] else plain_type(types[name])) for name in held])
    row_key = pa.schema([(name, plain_type(after.field(name).type)) for name in config.schema.row_key if name not in columns.names])
    transforms = ServedTransforms(steps, pa.schema([(name, _without_dictionary(types[name])) for name in plan.read]))
    graph = served_graph(trained, options.tables)
    program = trace(graph, config.schema, sum(len(of_task) for of_task in segments.values()))
    for form in options.formats:
        _write_graph(program, config.schema, form, folder / GRAPHS[form])
    (folder / SCHEMA).write_text(to_yaml(config.schema), encoding="utf-8")
    (folder / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    write_mlflow_model(folder, config.schema, columns)
    facts = {
        "name": config.name,
        "source": {"checkpoint": trained.checkpoint.name, "fingerprint": fingerprint_of(trained.checkpoint), "output": config.output},
        "tables": options.tables,
        "versions": run_tags(),
    }
    write_manifest(folder, config.schema, columns, row_key, segments, transforms, facts)
    return open_package(folder)


def _write_graph(program: torch.export.ExportedProgram, schema: Schema, form: Format, path: Path) -> None:
    if form == "onnx":
        write_onnx(program, input_names(schema), path)
        return
    with without_chatter():
        if form == "program":
            torch.export.save(program, path)
            return
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        except Exception as error:
            raise refused(error, "aoti") from error


def _complete(folder: Path, package: Package) -> None:
    """Describes the folder again, now with the parity report in it."""
    (folder / PACKAGE).unlink()
    facts = {name: package.facts[name] for name in ("name", "source", "tables", "versions")}
    write_manifest(folder, package.schema, package.columns, package.row_key, package.segments, package.transforms, facts)


def _segments_of(calibrators: Mapping[str, Calibrator]) -> list[str]:
    return list(dict.fromkeys(column for calibrator in calibrators.values() for column in calibrator.segments))


def _without_dictionary(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def stored_columns(source: ParquetSource, others: Sequence[str]) -> pa.Schema:
    """Types of the columns that features read, and of others, after the transforms of the config."""
    names = tuple(dict.fromkeys([*source.schema.feature_columns, *others]))
    return next(source.record_batches(names, at_most=1)).schema
