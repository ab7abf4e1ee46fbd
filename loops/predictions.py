"""Files of predictions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from mlenv.batch import Batch
from mlenv.errors import ConfigError

_FILE = "part-00000.parquet"


class PredictionWriter:
    """Writes the pass-through columns and, for each task, ``label_TASK``, ``weight_TASK`` and ``prediction_TASK``.

    The folder appears whole when the writer is left, in place of an earlier one; after an error nothing of it is left.

    Raises:
        ConfigError: the folder holds something other than predictions, or its parent does not exist.
    """

    def __init__(self, folder: Path, tasks: Sequence[str]) -> None:
        if not folder.parent.is_dir():
            raise ConfigError(
                str(folder), expected="a folder whose parent exists", received=f"no folder {folder.parent}", fix=f"mkdir -p {folder.parent}"
            )
        folder = folder.resolve()
        if folder.exists() and not _holds_predictions(folder):
            raise ConfigError(
                str(folder), expected="a new folder, or one of predictions", received="other files", fix="name another folder"
            )
        # The process id keeps two commands that write the same folder apart; the later one wins.
        self._folder, self._temporary, self._tasks = folder, folder.with_name(f".{folder.name}.{os.getpid()}.part"), tasks
        self._writer: pq.ParquetWriter | None = None
        self.num_rows = 0

    def write(self, batch: Batch, predictions: Tensor) -> None:
        """Adds the rows of one batch."""
        columns = {} if batch.metadata is None else {name: batch.metadata.column(name) for name in batch.metadata.schema.names}
        for place, task in enumerate(self._tasks):
            for name, values in (("label", batch.labels), ("weight", batch.weights), ("prediction", predictions)):
                columns[f"{name}_{task}"] = pa.array(values[:, place].float().cpu().numpy())
        rows = pa.RecordBatch.from_pydict(columns)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._temporary / _FILE, rows.schema, compression="zstd")
        self._writer.write_batch(rows)
        self.num_rows += len(batch)

    def __enter__(self) -> PredictionWriter:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._writer is not None:
                self._writer.close()  # writes the footer, for which a disk may have no room
            if kind is None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._temporary.rename(self._folder)
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)


def _holds_predictions(folder: Path) -> bool:
    """Whether a folder is empty or was written by this class, so that replacing it loses nothing of a user's."""
    if not folder.is_dir():
        return False
    files = list(folder.iterdir())
    return all(file.name == _FILE and any(name.startswith("prediction_") for name in pq.read_schema(file).names) for file in files)
