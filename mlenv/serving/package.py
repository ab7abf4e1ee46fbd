"""A model as it is served: a folder with all that is needed to turn raw feature values into predictions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import xxhash
from omegaconf import OmegaConf

from mlenv.composition import from_plain, to_plain, to_yaml
from mlenv.config import TRANSFORMS
from mlenv.errors import CheckpointError, ConfigError
from mlenv.schema import Schema
from mlenv.serving.row_transforms import ServedTransforms, Steps

Format = Literal["onnx", "aoti", "program"]
FORMATS: tuple[Format, ...] = get_args(Format)

PACKAGE = "package.json"
SCHEMA = "schema.yaml"
COLUMNS = "columns.arrow"
PARITY = "parity.json"
TRANSFORMS_FILE = "transforms.yaml"
STORED = "stored.arrow"
GRAPHS: dict[Format, str] = {"onnx": "model.onnx", "aoti": "model_aoti.pt2", "program": "model.pt2"}
"""File of the numeric graph in each format."""

_VERSION = 1
_KEPT = {b"mlenv": b"row key"}
"""Of the columns that are no part of the model's input."""


@dataclass(frozen=True)
class Package:
    """What a package says of itself."""

    folder: Path
    schema: Schema
    columns: pa.Schema
    """What a request holds of each row."""
    row_key: pa.Schema
    """What it may hold beside them, for the log of what was served: the columns of the row key that no feature reads."""
    segments: Mapping[str, Mapping[str, tuple[str, ...]]]
    """By task, then by column: the values that its calibrator knows, in the order of their codes, which begin at 1."""
    transforms: ServedTransforms
    """What happens to a request before it is encoded."""
    facts: Mapping[str, Any]
    """Name, source, versions, how tables are stored, formats."""

    @property
    def formats(self) -> tuple[Format, ...]:
        """Formats of the graph that are there, the ones that need least first."""
        return tuple(one for one in FORMATS if (self.folder / GRAPHS[one]).is_file())


def write_manifest(
    folder: Path,
    schema: Schema,
    columns: pa.Schema,
    row_key: pa.Schema,
    segments: Mapping[str, Mapping[str, Iterable[str]]],
    transforms: ServedTransforms,
    facts: Mapping[str, Any],
) -> None:
    """Describes what is in the folder, which is complete but for this; the checksums are of every other file."""
    _write_columns(pa.schema([*columns, *(field.with_metadata(_KEPT) for field in row_key)]), folder / COLUMNS)
    if transforms.steps:
        (folder / TRANSFORMS_FILE).write_text(to_yaml({"steps": to_plain(transforms.steps, TRANSFORMS)}), encoding="utf-8")
        _write_columns(transforms.stored, folder / STORED)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "version": _VERSION,
        **facts,
        "schema_fingerprint": schema.fingerprint,
        "tasks": list(schema.tasks),
        "segments": segments,
        "files": {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3": _checksum(path)} for path in files},
    }
    (folder / PACKAGE).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def open_package(folder: Path) -> Package:
    """Reads a package and compares its files with their checksums.

    Raises:
        ConfigError: there is no package, or one of a later version of mlenv.
        CheckpointError: a file of it is missing or damaged.
    """
    if not (folder / PACKAGE).is_file():
        fix = "write one: mlenv export OUTPUT --out FOLDER"
        raise ConfigError(str(folder), expected=f"a package, with {PACKAGE}", received="no such file", fix=fix)
    manifest = json.loads((folder / PACKAGE).read_text(encoding="utf-8"))
    if manifest["version"] != _VERSION:
        received = f"version {manifest['version']}"
        raise ConfigError(str(folder), expected=f"a package of version {_VERSION}", received=received, fix="serve it with a newer mlenv")
    for name, stored in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != stored["bytes"] or _checksum(path) != stored["xxh3"]:
            received = "another content" if path.is_file() else "no such file"
            raise CheckpointError(str(path), expected=f"what {PACKAGE} says", received=received, fix="copy or export the package again")
    schema: Schema = from_plain(OmegaConf.to_container(OmegaConf.load(folder / SCHEMA)), Schema, str(folder / SCHEMA))  # type: ignore[arg-type]
    both = _read_columns(folder / COLUMNS)
    columns = pa.schema([field for field in both if field.metadata != _KEPT])
    row_key = pa.schema([field.remove_metadata() for field in both if field.metadata == _KEPT])
    segments = {task: {column: tuple(values) for column, values in of_task.items()} for task, of_task in manifest.pop("segments").items()}
    return Package(folder, schema, columns, row_key, segments, _read_transforms(folder), manifest)


def _read_transforms(folder: Path) -> ServedTransforms:
    if not (folder / TRANSFORMS_FILE).is_file():
        return ServedTransforms()
    plain = OmegaConf.to_container(OmegaConf.load(folder / TRANSFORMS_FILE))
    steps: Steps = from_plain(plain, Steps, str(folder / TRANSFORMS_FILE))  # type: ignore[arg-type]
    return ServedTransforms(steps.steps, _read_columns(folder / STORED))


def _write_columns(columns: pa.Schema, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, columns):
        pass


def _read_columns(path: Path) -> pa.Schema:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).schema


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
