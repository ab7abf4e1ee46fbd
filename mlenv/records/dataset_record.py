"""What a training read: windows, files with their contents, transforms, joined tables; kept with the run, compared with another's."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

import xxhash

from mlenv.composition import from_plain, to_plain
from mlenv.config import TRANSFORMS, DataConfig, TableTransform, TableTransformConfig, TransformConfig, WindowConfig, WindowTransformConfig
from mlenv.datasets.parquet_source import ParquetSource, list_files, open_folder, partitions
from mlenv.datasets.stored_files import ContentHash, StoredFile, describe_files
from mlenv.errors import CheckpointError, DataError
from mlenv.kinds import kind_field
from mlenv.schema import Schema
from mlenv.transforms import open_tables

logger = logging.getLogger(__name__)

DATASET_FILE: Final = "dataset.json"

_Split = TypeVar("_Split", bound=str)
_VERSION: Final = 1
_NAMED: Final = 20
"""Files that a difference names."""
_SCHEMA_LENGTH: Final = 1_000_000
"""Characters of a schema that MLflow takes."""


@dataclass(frozen=True, kw_only=True)
class WindowRecord:
    """One window of a data set, as it was read."""

    window: WindowConfig
    days: tuple[str, ...]
    """Partition days with rows."""
    columns: dict[str, str]
    """Columns that were read, with their types as stored."""
    num_stored_rows: int
    num_rows: int
    """What the transforms left."""
    fingerprint: str
    joins: dict[str, dict[str, str]]
    """Tables that were joined and their fingerprints, by key of the config."""
    passed_over: tuple[str, ...]
    """Files and row groups that could not be read."""
    findings: tuple[str, ...]
    """What transforms that look over the whole window dropped or sampled."""
    files: tuple[StoredFile, ...]

    @property
    def num_bytes(self) -> int:
        """Of the files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """``dataset.json``."""

    path: str
    """``data.path``, absolute."""
    content_hash: ContentHash
    schema_fingerprint: str
    event_time: str
    """``schema.event_time``, which joins go by."""
    transforms: list[dict[str, Any]]
    """As in the config."""
    windows: dict[str, WindowRecord]
    """By train, validation and test."""

    def to_json(self) -> str:
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1)


def record_dataset(
    config: DataConfig, sources: Mapping[_Split, ParquetSource], schema: Schema, known: DatasetRecord | None
) -> DatasetRecord:
    """Reads the files of the windows to the last byte, unless ``data.content_hash`` says otherwise.

    Args:
        known: an earlier record; files that are untouched since are not read again.

    Raises:
        DataError: a file cannot be read.
    """
    started = time.perf_counter()
    filesystem, folder = open_folder(config.path)
    paths = sorted({file for source in sources.values() for file in source.files})
    earlier = {} if known is None else {file.path: file for window in known.windows.values() for file in window.files}
    files = dict(zip(paths, describe_files(filesystem, folder, paths, config.content_hash, earlier), strict=True))
    total = sum(file.bytes for file in files.values())
    logger.info("recorded %s, %s, in %.1f s", _count(len(files), "file"), _size(total), time.perf_counter() - started)
    transforms = to_plain(config.transforms, TRANSFORMS)

    def record(split: str, source: ParquetSource) -> WindowRecord:
        return WindowRecord(
            window=getattr(config, split),
            days=source.days,
            columns=source.stored_columns,
            num_stored_rows=source.num_stored_rows,
            num_rows=source.num_rows,
            fingerprint=source.fingerprint,
            joins={
                f"data.transforms[{place}]": {"table": str(transforms[place].get("table", "")), "fingerprint": fingerprint}
                for place, fingerprint in source.table_fingerprints.items()
            },
            passed_over=tuple(line.removeprefix(f"{folder}/") for line in source.skipped),
            findings=source.findings,
            files=tuple(files[file] for file in source.files),
        )

    return DatasetRecord(
        path=config.path if "://" in config.path else str(Path(config.path).resolve()),
        content_hash=config.content_hash,
        schema_fingerprint=schema.fingerprint,
        event_time=schema.event_time,
        transforms=transforms,
        windows={split: record(split, source) for split, source in sources.items()},
    )


def read_dataset_record(file: Path) -> DatasetRecord:
    """
    Raises:
        DataError: the file is not what ``DatasetRecord.to_json`` wrote, or a later version wrote it.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        version = entries.pop("version")
        if version != _VERSION:
            raise DataError(str(file), expected=f"a record of version {_VERSION}", received=version, fix="use the mlenv that wrote it")
        windows = {split: _window(entry) for split, entry in entries.pop("windows").items()}
        return DatasetRecord(**entries, windows=windows)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        fix = "remove the file, if the training is to go on without it"
        raise DataError(str(file), expected="what a training wrote", received=f"{type(error).__name__}: {error}", fix=fix) from error


def _window(entry: dict[str, Any]) -> WindowRecord:
    window = entry.pop("window")
    window["skip_dates"] = tuple(window["skip_dates"])
    lists: dict[str, Any] = {name: tuple(entry.pop(name)) for name in ("days", "passed_over", "findings")}
    return WindowRecord(window=WindowConfig(**window), files=tuple(StoredFile(**file) for file in entry.pop("files")), **lists, **entry)


def check_same_content(known: DatasetRecord, now: DatasetRecord, checkpoint: Path) -> None:
    """Holds a training that goes on to the rows that it was begun with. The test window may be another: nothing was learned from it.

    Raises:
        CheckpointError: a file of a window that both have holds something else now.
    """
    for split in ("train", "validation"):
        before, after = known.windows.get(split), now.windows.get(split)
        if before is None or after is None or before.window != after.window:
            continue
        _, _, changed = compare_files(before.files, after.files)
        if changed:
            what = "training" if split == "train" else split
            received = ", ".join(_names(changed)) + f", with other contents than {DATASET_FILE} tells of"
            fix = "put the files back as they were, or start over with another output"
            raise CheckpointError(f"{checkpoint}, {what} data", expected="the files it was trained with", received=received, fix=fix)


def compare_files(one: Iterable[StoredFile], other: Iterable[StoredFile]) -> tuple[list[str], list[str], list[str]]:
    """Paths that only the second has, that only the first has, and that hold something else."""
    before, after = {file.path: file for file in one}, {file.path: file for file in other}
    changed = [path for path in before if path in after and not before[path].holds_the_same(after[path])]
    return [path for path in after if path not in before], [path for path in before if path not in after], changed


def differences(one: DatasetRecord, other: DatasetRecord) -> list[str]:
    """What the second run read otherwise than the first, in words; nothing when both read the same, wherever it lay."""
    found = []
    for split in dict.fromkeys((*one.windows, *other.windows)):
        before, after = one.windows.get(split), other.windows.get(split)
        if before is None or after is None:
            found.append(f"{split}: only {'the first' if after is None else 'the second'} has this window")
        else:
            found += [f"{split}: {line}" for line in _window_differences(before, after)]
    if one.schema_fingerprint != other.schema_fingerprint:
        found.append(_became("schema fingerprint", one.schema_fingerprint, other.schema_fingerprint))
    for place in range(max(len(one.transforms), len(other.transforms))):
        pair = [record.transforms[place] if place < len(record.transforms) else None for record in (one, other)]
        if pair[0] != pair[1]:
            found.append(_became(f"data.transforms[{place}]", *(json.dumps(transform) if transform else "none" for transform in pair)))
    return found


def _window_differences(one: WindowRecord, other: WindowRecord) -> list[str]:
    found = []
    if one.window != other.window:
        found.append(_became("window", one.window, other.window))
    for what, before, after in (("days", one.days, other.days), ("columns", _typed(one.columns), _typed(other.columns))):
        found += [f"{what} {sign}: {', '.join(_names(names))}" for sign, names in _moved(before, after)]
    for what, rows, other_rows in (
        ("rows stored", one.num_stored_rows, other.num_stored_rows),
        ("rows read", one.num_rows, other.num_rows),
    ):
        if rows != other_rows:
            found.append(_became(what, f"{rows:,}", f"{other_rows:,}"))
    added, removed, changed = compare_files(one.files, other.files)
    for sign, paths in (("added", added), ("removed", removed), ("changed", changed)):
        if paths:
            found.append(f"{_count(len(paths), 'file')} {sign}: {', '.join(_names(paths))}")
    for place in dict.fromkeys((*one.joins, *other.joins)):
        tables = [f"{join['table']} ({join['fingerprint']})" if (join := window.joins.get(place)) else "none" for window in (one, other)]
        if tables[0] != tables[1]:
            found.append(_became(f"table of {place}", *tables))
    for what, lines, other_lines in (
        ("passed over", one.passed_over, other.passed_over),
        ("findings", one.findings, other.findings),
    ):
        found += [f"{what} {sign}: {'; '.join(_names(names))}" for sign, names in _moved(lines, other_lines)]
    return found


def changes_since(record: DatasetRecord) -> list[str]:
    """Files and tables that are gone, new or other than the record says, in words. What was recorded by all its bytes is read to
    the last byte.

    Raises:
        DataError: the data set or a table is not there any more, or cannot be read.
    """
    filesystem, folder = open_folder(record.path)
    tables = _table_fingerprints(record)
    found = []
    for split, window in record.windows.items():
        listed = [str(PurePosixPath(file).relative_to(folder)) for file in list_files(filesystem, folder, window.window.path)]
        # A dict, for its order: a window may have very many files.
        chosen = dict.fromkeys(file for file in listed if window.window.holds(partitions(file).get("date", "")))
        kept = [file.path for file in window.files if file.path in chosen]
        expected = {*kept, *(line.partition(", row group ")[0] for line in window.passed_over)}
        new = [file for file in chosen if file not in expected]
        now = describe_files(filesystem, folder, kept, record.content_hash)
        _, removed, changed = compare_files(window.files, now)
        for sign, paths in (("added", new), ("removed", removed), ("changed", changed)):
            if paths:
                found.append(f"{split}: {_count(len(paths), 'file')} {sign}: {', '.join(_names(paths))}")
        for place, fingerprint in tables.items():
            before = window.joins.get(place, {}).get("fingerprint", fingerprint)
            if before != fingerprint:
                found.append(f"{split}: table of {place} changed: {window.joins[place]['table']}, {before} became {fingerprint}")
    return found


@dataclass(frozen=True, kw_only=True)
class _Transforms:
    transforms: tuple[TransformConfig | WindowTransformConfig | TableTransformConfig, ...] = kind_field(TRANSFORMS, default=())


def _table_fingerprints(record: DatasetRecord) -> dict[str, str]:
    """Of the tables that the record's transforms join, as they are now, by key of the config."""
    if not any(window.joins for window in record.windows.values()):
        return {}
    transforms = from_plain({"transforms": record.transforms}, _Transforms, DATASET_FILE).transforms
    opened = enumerate(open_tables(transforms, record.event_time))
    return {f"data.transforms[{place}]": table.fingerprint for place, table in opened if isinstance(table, TableTransform)}


def summary(record: DatasetRecord, *, with_files: bool = False) -> str:
    """The record for people."""
    by = "all their bytes" if record.content_hash == "bytes" else "their footers alone"
    lines = [f"data     {record.path}", f"schema   {record.schema_fingerprint}", f"files are told by {by}"]
    for split, window in record.windows.items():
        left = "" if window.num_rows == window.num_stored_rows else f", {window.num_rows:,} after the transforms"
        days = f"{_count(len(window.days), 'day')}, {window.days[0]} to {window.days[-1]}" if window.days else "no days"
        lines += [
            f"{split}: {window.window}",
            f"  {days}; {window.num_stored_rows:,} rows{left}",
            f"  {_count(len(window.files), 'file')}, {_size(window.num_bytes)}; {_count(len(window.columns), 'column')}",
            f"  fingerprint {window.fingerprint}",
        ]
        lines += [f"  {place} joins {join['table']}, fingerprint {join['fingerprint']}" for place, join in window.joins.items()]
        lines += [f"  passed over: {line}" for line in window.passed_over]
        lines += [f"  {line}" for line in window.findings]
        if with_files:
            lines += [
                f"  {file.content or f'footer {file.footer}'}  {file.rows:>11,} rows  {_size(file.bytes):>9}  {file.path}"
                for file in window.files
            ]
    if record.transforms:
        lines += ["transforms:", *(f"  [{place}] {json.dumps(transform)}" for place, transform in enumerate(record.transforms))]
    return "\n".join(lines)


def mlflow_inputs(record: DatasetRecord) -> list[dict[str, str]]:
    """The windows as data sets of MLflow. The digest tells what was read and as what: MLflow keeps one input for each digest."""
    scheme, separator, _ = record.path.partition("://")
    inputs = []
    for split, window in record.windows.items():
        contents = [[file.path, file.content or file.footer] for file in window.files]
        text = json.dumps([split, window.fingerprint, window.joins, record.transforms, record.schema_fingerprint, contents])
        schema = json.dumps({"mlflow_colspec": [{"name": name, "type": kind} for name, kind in window.columns.items()]})
        profile: dict[str, object] = {
            "num_rows": window.num_rows,
            "num_stored_rows": window.num_stored_rows,
            "num_files": len(window.files),
        }
        profile |= {"num_bytes": window.num_bytes, "window": str(window.window), "num_days": len(window.days)}
        inputs.append(
            {
                "context": split,
                "name": PurePosixPath(record.path).name or record.path,
                "digest": xxhash.xxh3_128(text.encode()).hexdigest(),
                "source_type": scheme if separator else "local",
                "source": json.dumps({"uri": record.path}),
                "schema": schema if len(schema) < _SCHEMA_LENGTH else "",
                "profile": json.dumps(profile),
            }
        )
    return inputs


def _typed(columns: Mapping[str, str]) -> list[str]:
    return [f"{name} {kind}" for name, kind in columns.items()]


def _moved(one: Sequence[str], other: Sequence[str]) -> list[tuple[str, list[str]]]:
    """What came and went, with the word for it; leaves out what did not happen."""
    before, after = set(one), set(other)
    signs = (("added", [name for name in other if name not in before]), ("removed", [name for name in one if name not in after]))
    return [(sign, names) for sign, names in signs if names]


def _became(what: str, before: object, after: object) -> str:
    return f"{what}: {before} became {after}"


def _names(names: Iterable[str]) -> list[str]:
    listed = list(names)
    return [*listed[:_NAMED], f"and {len(listed) - _NAMED} more"] if len(listed) > _NAMED else listed


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes:,} B"
