"""Parquet to Batch, beside a bare Arrow read of the same columns and the loaders of other libraries over the same file."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq

from benchmarks import criteo_shaped, wide_set
from benchmarks.comparison import Result, markdown_table, median_ratio, paired_seconds
from benchmarks.crossing_peers import FOLDER
from benchmarks.loader_memory import peak_growth
from benchmarks.loader_peers import InMemory, fuxictr, ray_data, start_ray
from mlenv.config import DataConfig, TransformConfig, WindowConfig
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.datasets.transforms.derive import DeriveConfig
from mlenv.datasets.transforms.filter import FilterConfig
from mlenv.datasets.transforms.sampling import SampleNegativesConfig
from mlenv.datasets.transforms.values import HashConfig
from mlenv.schema import Schema

FIVE: tuple[TransformConfig, ...] = (
    FilterConfig(where="I0 > -2"),
    DeriveConfig(column="I1", sql="I1 * 2 + I2"),
    DeriveConfig(column="I3", sql="CASE WHEN I3 > 0 THEN I3 ELSE 0 END"),
    SampleNegativesConfig(negative="click = 0", rate=0.9),
    HashConfig(column="C0", num_buckets=1000),
)
"""They leave about nine rows in ten, so that the encoding has almost as much to do as without them."""

NUM_EMBEDDINGS, BATCH_SIZE, REPETITIONS = 10_000, 4096, 5
ONE_THREAD, THREADS = "bare read, one thread", "bare read, Arrow's threads"
PLAIN, SHUFFLED, TRANSFORMED = "ParquetSource to Batch", "the same, shuffled", "the same, five transforms"
RAY_DATA, FUXICTR, FUXICTR_NPZ = "ray.data iter_torch_batches", "FuxiCTR ParquetDataLoader", "FuxiCTR NpzDataLoader, in memory"
BARE_TARGET, FUXICTR_TARGET, RAY_TARGET, MEMORY_TARGET = 0.7, 5.0, 3.0, 1 << 30


@dataclass(frozen=True)
class DataSet:
    """A generated set that is read."""

    title: str
    module: ModuleType
    num_rows: int

    def write(self, folder: Path) -> Schema:
        folder.mkdir()
        self.module.write_set(folder, self.num_rows, NUM_EMBEDDINGS)
        schema: Schema = self.module.schema_of(NUM_EMBEDDINGS)
        return schema


SETS = (
    DataSet("26 columns of ids, 13 of numbers", criteo_shaped, 1_000_000),
    DataSet("130 columns of ids, 50 of numbers, 20 sequences of 10 ids", wide_set, 150_000),
)


def measure(folder: Path) -> Result:
    start_ray()
    rows, verdicts, reached = [], [], True
    for number, data_set in enumerate(SETS):
        seconds = _seconds(data_set, folder / f"set-{number}")
        for way, taken in seconds.items():
            rate = data_set.num_rows / statistics.median(taken)
            against = [f"{median_ratio(seconds, way, base):.2f}" for base in (ONE_THREAD, THREADS)]
            rows.append([data_set.title if way == ONE_THREAD else "", way, f"{rate / 1e6:.3g} M", *against])
        bare = median_ratio(seconds, PLAIN, THREADS)
        verdicts.append(f"{data_set.title}: {bare:.2f} of the bare read by Arrow's threads (target: {BARE_TARGET}).")
        reached &= bare >= BARE_TARGET
        for way in (PLAIN, TRANSFORMED):
            ratios = {peer: median_ratio(seconds, way, peer) for peer in (RAY_DATA, FUXICTR, FUXICTR_NPZ) if peer in seconds}
            targets = {RAY_DATA: RAY_TARGET, FUXICTR: FUXICTR_TARGET, FUXICTR_NPZ: FUXICTR_TARGET}
            reached &= all(ratio >= targets[peer] for peer, ratio in ratios.items())
            named = ", ".join(f"{ratio:.1f} times {peer} (target: {targets[peer]:.0f})" for peer, ratio in ratios.items())
            verdicts.append(f"{way}: {named}.")
    grown = peak_growth(folder / "set-0", SETS[0].num_rows // 10)
    verdicts.append(f"Shuffled in windows of a tenth of the rows, memory rises by {grown / 2**20:.0f} MiB at most (target: 1024).")
    if not FOLDER.is_dir():
        verdicts.append("FuxiCTR was left out: make peers.")
    return Result(
        "Loader: Parquet to Batch, batch 4,096",
        markdown_table(["set", "way", "rows/s", f"against {ONE_THREAD}", f"against {THREADS}"], rows),
        "\n\n".join(verdicts),
        reached and grown <= MEMORY_TARGET,
    )


def _seconds(data_set: DataSet, folder: Path) -> dict[str, list[float]]:
    schema = data_set.write(folder)
    file, columns = folder / "part-00000.parquet", schema.columns

    def bare(use_threads: bool) -> None:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            parquet.read_row_group(group, columns=list(columns), use_threads=use_threads)

    def batches(shuffle: bool, transforms: tuple[TransformConfig, ...] = ()) -> None:
        config = DataConfig(path=str(folder), train=WindowConfig(), batch_size=BATCH_SIZE, transforms=transforms)
        source = ParquetSource(config, WindowConfig(), schema, shuffle=shuffle, is_training=True)
        rows = sum(len(batch) for batch in source.batches())
        assert rows == data_set.num_rows if not transforms else 0.8 * data_set.num_rows < rows < data_set.num_rows

    def whole(read: Callable[[], int]) -> Callable[[], None]:
        def checked() -> None:
            assert read() == data_set.num_rows

        return checked

    ways: dict[str, Callable[[], None]] = {
        ONE_THREAD: lambda: bare(False),
        THREADS: lambda: bare(True),
        PLAIN: lambda: batches(False),
        SHUFFLED: lambda: batches(True),
        TRANSFORMED: lambda: batches(False, FIVE),
        RAY_DATA: whole(lambda: ray_data(file, columns, BATCH_SIZE)),
    }
    if FOLDER.is_dir():
        in_memory = InMemory(file, columns)
        ways[FUXICTR] = whole(lambda: fuxictr(file, columns, BATCH_SIZE))
        ways[FUXICTR_NPZ] = whole(lambda: in_memory.read(BATCH_SIZE))
    return paired_seconds(ways, REPETITIONS)
