"""What embedding tables weigh, where they lie, and whether the memory is there for them: said before any of it is taken."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mlenv.config import EmbeddingsConfig
from mlenv.errors import ConfigError
from mlenv.loops.ranks import rank, world_size
from mlenv.schema import Table

FLOAT_BYTES = 4


@dataclass(frozen=True)
class TableShard:
    """A part of a table on one rank."""

    rank: int
    rows: int
    columns: int
    bytes: int
    """With what its optimizer keeps."""


@dataclass(frozen=True)
class TablePlacement:
    """Where a table lies."""

    sharding: str
    """As ``embeddings.sharding`` has it; ``replicated`` for a copy on every rank."""
    kernel: str
    """What looks the rows up and updates them: TorchRec's name, or ``torch``."""
    shards: tuple[TableShard, ...]
    estimated_milliseconds: float | None = None
    """Of a step, as TorchRec's planner guesses from its own idea of the hardware; None where it was not asked."""

    def __str__(self) -> str:
        return f"{self.sharding} on ranks {sorted({shard.rank for shard in self.shards})}"


def state_bytes(optimizer: str, rows: int, columns: int) -> int:
    """What an optimizer of ``embeddings.optimizer`` keeps of so many rows."""
    return {"row_wise_adagrad": rows, "adam": 2 * rows * columns, "sgd": 0}[optimizer] * FLOAT_BYTES


def replicated(tables: Mapping[str, Table], config: EmbeddingsConfig) -> dict[str, TablePlacement]:
    """Where the engine torch has its tables: all of them on every rank."""
    placements = {}
    for name, table in tables.items():
        rows, columns = table.num_embeddings, table.embedding_dim
        size = rows * columns * FLOAT_BYTES + state_bytes(config.of(name).optimizer, rows, columns)
        placements[name] = TablePlacement(
            "replicated", "torch", tuple(TableShard(place, rows, columns, size) for place in range(world_size()))
        )
    return placements


def check_memory(placements: Mapping[str, TablePlacement], free: int, *, of_all_ranks: bool = False) -> None:
    """Refuses tables that this rank has no room for.

    Args:
        free: bytes that this rank may take.
        of_all_ranks: the shards are what each rank would have if the tables could be divided as one likes.

    Raises:
        ConfigError: names the tables that take the most.
    """
    here: Counter[str] = Counter()
    for table, placement in placements.items():
        here[table] += sum(shard.bytes for shard in placement.shards if of_all_ranks or shard.rank == rank())
    needed = here.total()
    if needed <= free:
        return
    largest = ", ".join(f"{table} {readable(size)}" for table, size in here.most_common(3))
    where = "each rank" if of_all_ranks else f"rank {rank()}"
    fix = "lower num_embeddings or embedding_dim; or divide the tables with embeddings.engine=torchrec over more processes on more machines"
    raise ConfigError(
        "schema.tables",
        expected=f"tables that fit into the {readable(free)} that {where} has free",
        received=f"{readable(needed)} with their optimizers, the most of it in {largest}",
        fix=fix,
    )


def free_bytes(device: torch.device) -> int:
    """Memory of the device that a rank may take: all that a GPU has free, or its share of what this machine has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")
    )
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"  # of the container, which may have less than the machine
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int((group / "memory.current").read_text()))
    return max(available, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def readable(size: float) -> str:
    """Bytes in the largest unit of which there is one: ``3.2 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} TiB"
