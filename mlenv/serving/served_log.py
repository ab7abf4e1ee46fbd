"""What a server was asked and what it answered, in Parquet files, to be compared with what the model was trained on."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlenv.datasets.encoded_rows import Floats
from mlenv.errors import ConfigError

logger = logging.getLogger(__name__)

FILE_ROWS = 10_000
"""Rows after which a file is written."""
FILE_SECONDS = 60.0
"""Seconds after which the next request has a file written, however few its rows are."""


class ServedLog:
    """Gathers requests in memory and writes them file by file, each whole or not at all.

    Columns: ``served_request_id``, ``served_row``, ``served_at``, then the row key, the raw values of the request and ``prediction_TASK``.
    A file that cannot be written costs its rows and a warning, never an answer. Close it to write the rest.

    Raises:
        ConfigError: the folder's parent is not there.
    """

    def __init__(self, folder: Path, tasks: tuple[str, ...], *, file_rows: int = FILE_ROWS, file_seconds: float = FILE_SECONDS) -> None:
        if not folder.parent.is_dir():
            raise ConfigError("--log", expected="a folder whose parent exists", received=str(folder), fix=f"mkdir -p '{folder.parent}'")
        folder.mkdir(exist_ok=True)
        self._folder, self._tasks, self._file_rows, self._file_seconds = folder, tasks, file_rows, file_seconds
        self._lock = threading.Lock()
        self._parts: list[pa.RecordBatch] = []
        self._num_rows, self._began = 0, time.monotonic()

    def add(self, request_id: str, keys: pa.RecordBatch, rows: pa.RecordBatch, predictions: Floats) -> None:
        """Keeps one request."""
        now = pa.scalar(time.time_ns() // 1000, pa.timestamp("us", "UTC"))
        values = {
            "served_request_id": pa.repeat(request_id, rows.num_rows),
            "served_row": pa.array(np.arange(rows.num_rows, dtype=np.int32)),
            "served_at": pa.repeat(now, rows.num_rows),
            **{field.name: columns.column(field.name) for columns in (keys, rows) for field in columns.schema},
            **{f"prediction_{task}": pa.array(predictions[:, place]) for place, task in enumerate(self._tasks)},
        }
        part = pa.RecordBatch.from_pydict(values)
        with self._lock:
            self._parts.append(part)
            self._num_rows += part.num_rows
            if self._num_rows < self._file_rows and time.monotonic() - self._began < self._file_seconds:
                return
            full = self._take()
        self._write(full)

    def close(self) -> None:
        """Writes what is left."""
        with self._lock:
            rest = self._take()
        self._write(rest)

    def _take(self) -> list[pa.RecordBatch]:
        parts, self._parts = self._parts, []
        self._num_rows, self._began = 0, time.monotonic()
        return parts

    def _write(self, parts: list[pa.RecordBatch]) -> None:
        if not parts:
            return
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}.parquet"
        temporary = self._folder / f".{name}.{os.getpid()}.part"
        try:
            pq.write_table(pa.Table.from_batches(parts), temporary, compression="zstd")
            temporary.rename(self._folder / name)
        except OSError as error:
            logger.warning("%s: %d requests are not in the log (%s).", self._folder, len(parts), error)
        finally:
            temporary.unlink(missing_ok=True)
