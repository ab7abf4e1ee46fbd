"""The folder of a batch inference: parts that appear whole one by one, what they were made of, and at the end that they are all there."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mlenv.errors import ConfigError, MlenvError
from mlenv.pages.page import write_whole

MANIFEST: Final = "_manifest.json"
SUCCESS: Final = "_SUCCESS"
METRICS: Final = "_metrics"
"""These names begin with ``_``, so that whoever reads the folder as Parquet passes them over."""
_LOCK: Final = ".lock"
_UNFINISHED: Final = ".unfinished"


class PredictionFolder:
    """Held by one process at a time, until it is left.

    Args:
        manifest: all that the predictions hang on, as JSON; a folder that was begun with another one is refused.

    Raises:
        ConfigError: see check_folder.
        MlenvError: another process writes here.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self._manifest = folder, manifest
        check_folder(folder, manifest)

    def __enter__(self) -> PredictionFolder:
        self.path.mkdir(exist_ok=True)
        self._lock: IO[str] = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise MlenvError(f"{self.path}: another process writes predictions here. Fix: wait for it, or name another folder.") from error
        check_folder(self.path, self._manifest)  # whoever held it may have begun something else
        for left_over in self.path.glob(f".*{_UNFINISHED}"):
            left_over.unlink()
        if not (self.path / MANIFEST).exists():
            write_whole(json.dumps(self._manifest, indent=1), self.path / MANIFEST)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.close()

    def holds(self, name: str, num_rows: int) -> bool:
        """Whether a part is there, whole; what a machine lost that went down is not."""
        try:
            return bool(pq.read_metadata(self.path / name).num_rows == num_rows)
        except (OSError, pa.ArrowException):
            return False

    def read(self, name: str) -> pa.Table:
        """A part that is there."""
        return pq.ParquetFile(self.path / name).read()

    def write(self, name: str, file: pa.Buffer) -> None:
        """Raises OSError when it cannot be written, and then leaves nothing of it."""
        unfinished = self.path / f".{name}{_UNFINISHED}"
        try:
            with unfinished.open("wb") as opened:
                opened.write(file)
                opened.flush()
                os.fsync(opened.fileno())
            unfinished.replace(self.path / name)
        finally:
            unfinished.unlink(missing_ok=True)

    def reopen(self) -> None:
        """Takes back that all is there."""
        (self.path / SUCCESS).unlink(missing_ok=True)

    def finish(self, record: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float | None]]) -> None:
        """Says that all is there, with metrics by model."""
        if metrics:
            (self.path / METRICS).mkdir(exist_ok=True)
        for name, figures in metrics.items():
            write_whole(json.dumps(figures, indent=2), self.path / METRICS / f"{name}.json")
        write_whole(json.dumps(record, indent=2), self.path / SUCCESS)

    @property
    def record(self) -> dict[str, Any] | None:
        """What ``finish`` was given, if it was."""
        path = self.path / SUCCESS
        return json.loads(path.read_text()) if path.exists() else None

    def metrics(self, name: str) -> dict[str, float]:
        """What ``finish`` was given for a model; nan for null."""
        path = self.path / METRICS / f"{name}.json"
        figures = json.loads(path.read_text()) if path.exists() else {}
        return {key: float("nan") if value is None else value for key, value in figures.items()}


def check_folder(folder: Path, manifest: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: it cannot be made, holds something else, or was begun with other models, rows or options.
    """
    if not folder.parent.is_dir():
        received, fix = f"no folder {folder.parent}", f"mkdir -p {folder.parent}"
        raise ConfigError(str(folder), expected="a folder whose parent exists", received=received, fix=fix)
    if not folder.exists():
        return
    if not folder.is_dir() or (not (folder / MANIFEST).exists() and any(path.name != _LOCK for path in folder.iterdir())):
        fix = "name another folder"
        raise ConfigError(str(folder), expected="a new folder, or one of predictions", received="other files", fix=fix)
    if (folder / MANIFEST).exists():
        changes = list(_changes(json.loads((folder / MANIFEST).read_text()), manifest))
        if changes:
            received = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
            expected = "the models, rows and options that it was begun with"
            fix = (
                "name another folder, or remove this one to score everything again; a version of a model stays what it is, an alias may not"
            )
            raise ConfigError(str(folder), expected=expected, received=received, fix=fix)


def _changes(before: Any, now: Any, place: str = "") -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            yield from _changes(before.get(key), now.get(key), f"{place}.{key}" if place else key)
    elif before != now:
        yield f"{place}: {before!r} became {now!r}"
