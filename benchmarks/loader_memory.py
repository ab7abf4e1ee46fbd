"""How much memory reading a data set takes: its peak in a process of its own, over what the process held before the first row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def peak_growth(folder: Path, shuffle_rows: int) -> int:
    """Bytes, for the shuffled batches of a set in the Criteo shape."""
    command = [sys.executable, "-m", "benchmarks.loader_memory", str(folder), str(shuffle_rows)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def _main(folder: str, shuffle_rows: str) -> None:
    from benchmarks.criteo_shaped import schema_of
    from benchmarks.loader import NUM_EMBEDDINGS
    from mlenv.config import DataConfig, WindowConfig
    from mlenv.datasets.parquet_source import ParquetSource

    config = DataConfig(path=folder, train=WindowConfig(), shuffle_rows=int(shuffle_rows))
    source = ParquetSource(config, WindowConfig(), schema_of(NUM_EMBEDDINGS), shuffle=True, is_training=True)
    before = _resident("VmRSS")
    for _ in source.batches():
        pass
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    _main(*sys.argv[1:])
