"""How other libraries bring the rows of a Parquet file to tensors, batch by batch; each function reads the file once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.crossing_peers import library


def start_ray() -> None:
    """One cluster for all peers that run on it; starting it is not measured."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def ray_data(file: Path, columns: Sequence[str], batch_size: int) -> int:
    """``ray.data.read_parquet(...).iter_torch_batches``; returns the rows."""
    import ray

    batches = ray.data.read_parquet(str(file), columns=list(columns)).iter_torch_batches(batch_size=batch_size)
    return sum(len(batch[columns[-1]]) for batch in batches)


def fuxictr(file: Path, columns: Sequence[str], batch_size: int) -> int:
    """FuxiCTR's ``ParquetDataLoader``, which reads by Ray Data."""
    loader = library("fuxictr.pytorch.dataloaders.parquet_dataloader").ParquetDataLoader
    features = SimpleNamespace(features=dict.fromkeys(columns[:-1]), labels=[columns[-1]])
    return sum(len(batch[columns[-1]]) for batch in loader(features, str(file), batch_size=batch_size))


class InMemory:
    """FuxiCTR's ``NpzDataLoader``, which holds all rows in memory and collates them one by one. Its file is written here, unmeasured."""

    def __init__(self, file: Path, columns: Sequence[str]) -> None:
        table = pq.read_table(file, columns=list(columns))
        arrays = {name: _matrix(table.column(name).combine_chunks(), table.num_rows) for name in columns}
        self._file = file.with_suffix(".npz")
        np.savez(self._file, **arrays)
        self._features = _FeatureMap({name: array.shape[1:] for name, array in arrays.items()})

    def read(self, batch_size: int) -> int:
        """Loads the file and reads it once; returns the rows."""
        loader = library("fuxictr.pytorch.dataloaders.npz_dataloader").NpzDataLoader
        batches = loader(self._features, str(self._file), batch_size=batch_size, num_workers=0)
        return sum(len(batch[self._features.labels[0]]) for batch in batches)


class _FeatureMap:
    """What the loader asks of FuxiCTR's FeatureMap: the columns, the label last, and where each lies among the numbers of a row."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        *names, label = shapes
        self.features, self.labels = dict.fromkeys(names), [label]
        self._places: dict[str, int | list[int]] = {}
        first = 0
        for name, shape in shapes.items():
            self._places[name] = list(range(first, first + shape[0])) if shape else first
            first += shape[0] if shape else 1

    def get_column_index(self, name: str) -> int | list[int]:
        return self._places[name]


def _matrix(column: pa.Array, rows: int) -> NDArray[Any]:
    """``(rows,)``, or ``(rows, length)`` of lists that are all of one length."""
    is_list = pa.types.is_list(column.type)
    array: NDArray[Any] = (column.flatten() if is_list else column).to_numpy(zero_copy_only=False)
    return array.reshape(rows, -1) if is_list else array
