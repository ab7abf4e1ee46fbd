"""Parquet to Batch, beside a bare Arrow read of the same columns."""

from __future__ import annotations

import statistics
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.comparison import Result, markdown_table, median_ratio, paired_seconds
from benchmarks.criteo_shaped import schema_of, write_set
from mlenv.config import DataConfig, TransformConfig, WindowConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.transforms.derive import DeriveConfig
from mlenv.datasets.transforms.filter import FilterConfig
from mlenv.datasets.transforms.sampling import SampleNegativesConfig
from mlenv.datasets.transforms.values import HashConfig

FIVE: tuple[TransformConfig, ...] = (
    FilterConfig(where="I0 > -2"),
    DeriveConfig(column="I1", sql="I1 * 2 + I2"),
    DeriveConfig(column="I3", sql="CASE WHEN I3 > 0 THEN I3 ELSE 0 END"),
    SampleNegativesConfig(negative="click = 0", rate=0.9),
    HashConfig(column="C0", num_buckets=1000),
)
"""They leave about nine rows in ten, so that the encoding has almost as much to do as without them."""

NUM_ROWS, NUM_EMBEDDINGS, BATCH_SIZE, REPETITIONS = 2_000_000, 10_000, 4096, 9
TARGET = 0.5


def measure(folder: Path) -> Result:
    write_set(folder, NUM_ROWS, NUM_EMBEDDINGS)
    schema = schema_of(NUM_EMBEDDINGS)

    def read(use_threads: bool) -> None:
        file = pq.ParquetFile(folder / "part-00000.parquet")
        for group in range(file.num_row_groups):
            file.read_row_group(group, columns=list(schema.columns), use_threads=use_threads)

    def batches(shuffle: bool, transforms: tuple[TransformConfig, ...] = ()) -> None:
        config = DataConfig(path=str(folder), train=WindowConfig(), batch_size=BATCH_SIZE, transforms=transforms)
        source = ParquetSource(config, WindowConfig(), schema, shuffle=shuffle, is_training=True)
        rows = sum(len(batch) for batch in source.batches())
        assert rows == NUM_ROWS if not transforms else 0.8 * NUM_ROWS < rows < NUM_ROWS

    ways = {
        "bare read, one thread": lambda: read(False),
        "bare read, Arrow's threads": lambda: read(True),
        "ParquetSource to Batch": lambda: batches(False),
        "ParquetSource to Batch, shuffled": lambda: batches(True),
        "ParquetSource to Batch, five transforms": lambda: batches(False, FIVE),
    }
    seconds = paired_seconds(ways, REPETITIONS)
    references = list(ways)[:2]
    rows = [
        [
            way,
            f"{NUM_ROWS / statistics.median(seconds[way]) / 1e6:.2f} M",
            *(f"{median_ratio(seconds, way, base):.2f}" for base in references),
        ]
        for way in ways
    ]
    ratio = min(median_ratio(seconds, "ParquetSource to Batch", base) for base in references)
    return Result(
        "Loader: 26 categorical + 13 numeric columns, batch 4,096",
        markdown_table(["way", "rows/s", *(f"against {base}" for base in references)], rows),
        f"Parquet to Batch runs at {ratio:.2f} of the faster bare read (target: at least {TARGET}).",
        ratio >= TARGET,
    )
