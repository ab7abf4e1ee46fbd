"""What a training step costs on GPUs that are not here: bytes of tables, bytes over links, and the time that they take at the least.

It counts bytes and divides by what data sheets promise. Kernel starts, latencies of the network and waiting for a slow rank are not
in it, and nothing overlaps: where it says that one way of dividing tables is ten times as dear as another, believe the ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlenv.errors import ConfigError, check_above, check_at_least
from mlenv.loops.step_meter import PEAK_TFLOPS
from mlenv.loops.table_memory import FLOAT_BYTES, TablePlacement, TableShard
from mlenv.schema import Schema

ID_BYTES, LENGTH_BYTES = 8, 4
"""As ``SparseFeatures`` has them."""

SECTOR_BYTES = 32
"""The least that a GPU moves between its memory and its cache. Source: NVIDIA, "CUDA C++ Best Practices Guide", coalesced access."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU and its links, as data sheets have them; per second, links in one direction."""

    memory_bytes: float
    memory_bandwidth: float
    host_bandwidth: float
    """To the GPUs of its host."""
    network_bandwidth: float
    """To other hosts; each GPU has a network card of its own."""
    operations: float
    """Multiplications and additions of float32."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "memory_bandwidth", "host_bandwidth", "network_bandwidth", "operations"):
            check_above(name, getattr(self, name), 0)


H100 = Hardware(
    memory_bytes=80e9, memory_bandwidth=3.35e12, host_bandwidth=450e9, network_bandwidth=50e9, operations=PEAK_TFLOPS["H100"][0] * 1e12
)
"""H100 SXM with HBM3, NVLink 4 (900 GB/s in both directions together) and a 400 Gb/s card for each GPU.

Source: NVIDIA, "H100 Tensor Core GPU" data sheet; NVIDIA, "DGX H100/H200 System User Guide", network modules.
"""


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends, or receives if that is more, in a step."""

    host: float = 0.0
    """To ranks of its host."""
    network: float = 0.0
    """To other hosts."""

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.host + other.host, self.network + other.network)

    def seconds(self, hardware: Hardware) -> float:
        """Both links work at once."""
        return max(self.host / hardware.host_bandwidth, self.network / hardware.network_bandwidth)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ranks, one GPU each, on hosts of equal size."""

    num_ranks: int
    ranks_per_host: int = 8
    hardware: Hardware = H100

    def __post_init__(self) -> None:
        check_at_least("num_ranks", self.num_ranks, 1)
        check_at_least("ranks_per_host", self.ranks_per_host, 1)
        if self.num_ranks > self.ranks_per_host and self.num_ranks % self.ranks_per_host:
            raise ConfigError("num_ranks", expected=f"a multiple of the {self.ranks_per_host} ranks of a host", received=self.num_ranks)

    @property
    def local_ranks(self) -> int:
        """Ranks of a host."""
        return min(self.num_ranks, self.ranks_per_host)

    def all_to_all(self, size: float) -> Sent:
        """What a rank sends that has ``size`` bytes, an equal part of them for every rank and so one for itself."""
        return Sent(size * (self.local_ranks - 1) / self.num_ranks, size * (self.num_ranks - self.local_ranks) / self.num_ranks)

    def ring(self, size: float) -> Sent:
        """What a rank sends of a reduce-scatter, or of an all-gather, of ``size`` bytes a rank.

        As many rings as a host has ranks, each of which leaves the host through another card.

        Source: NCCL tests, doc/PERFORMANCE.md: ``(n - 1) / n`` of the size leaves every rank.
        """
        size *= (self.num_ranks - 1) / self.num_ranks
        if self.num_ranks == self.local_ranks:
            return Sent(size)
        return Sent(size * (self.local_ranks - 1) / self.local_ranks, size / self.local_ranks)


@dataclass(frozen=True)
class Lookup:
    """One key that is looked up in a table; weights of its ids are not counted."""

    ids: float
    """Per example, on average."""
    is_pooled: bool = True
    """Whether the rows of an example become one vector where the table lies; else every row is sent."""


@dataclass(frozen=True)
class RankLoad:
    """What a rank has to do for the parts of tables that it holds, in a step of all ranks. Loads of several parts add up."""

    table_bytes: float = 0.0
    """The parts and what their optimizers keep."""
    buffer_bytes: float = 0.0
    """Ids that arrive and vectors that leave, all at once in memory."""
    memory_traffic: float = 0.0
    """Bytes read and written to look rows up and to update them. Every id counts as a row of its own, which repeated ids are not."""
    ids: Sent = Sent()
    """Ids and lengths of bags that arrive."""
    vectors: Sent = Sent()
    """Vectors that leave in the forward pass; as many bytes of gradients come back in the backward pass."""

    def __add__(self, other: RankLoad) -> RankLoad:
        return RankLoad(
            self.table_bytes + other.table_bytes,
            self.buffer_bytes + other.buffer_bytes,
            self.memory_traffic + other.memory_traffic,
            self.ids + other.ids,
            self.vectors + other.vectors,
        )


@dataclass(frozen=True)
class StepCost:
    """A step on paper."""

    ranks: tuple[RankLoad, ...]
    dense: Sent
    """To average the gradients of what is not a table."""
    seconds: dict[str, float]
    """By part of the step, of the rank that takes longest for it: ids, rows, vectors, dense layers, dense gradients."""

    @property
    def total_seconds(self) -> float:
        """One part after the other."""
        return sum(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def network_bytes(self) -> float:
        """Of the busiest rank, in the busier direction, forward and backward."""
        return max(rank.ids.network + 2 * rank.vectors.network for rank in self.ranks) + self.dense.network

    @property
    def host_bytes(self) -> float:
        """The same inside a host."""
        return max(rank.ids.host + 2 * rank.vectors.host for rank in self.ranks) + self.dense.host

    @property
    def table_bytes(self) -> float:
        """Of the rank that holds most."""
        return max(rank.table_bytes for rank in self.ranks)


def lookups_of(schema: Schema, ids_per_example: Mapping[str, float] | None = None) -> dict[str, tuple[Lookup, ...]]:
    """The lookups of every table of a schema.

    Args:
        ids_per_example: mean number of ids by key: the feature's name, or ``feature.field`` of a sequence. A key that is not there has one.

    Raises:
        ConfigError: a list without its mean length, or a length of no list.
    """
    told = dict(ids_per_example or {})
    keys = schema.sparse_keys
    if unknown := told.keys() - {key.name for key in keys}:
        raise ConfigError(
            "ids_per_example", expected=f"keys of the schema: {', '.join(key.name for key in keys)}", received=sorted(unknown)
        )
    if untold := [key.name for key in keys if key.group != "single" and key.name not in told]:
        raise ConfigError("ids_per_example", expected=f"the mean length of {', '.join(untold)}", received=sorted(told))
    lookups: dict[str, tuple[Lookup, ...]] = dict.fromkeys(schema.tables, ())
    for key in keys:
        lookups[key.table] += (Lookup(told.get(key.name, 1.0), key.lookup != "unpooled"),)
    return lookups


def shard_load(
    sharding: str, shard: TableShard, lookups: Sequence[Lookup], cluster: Cluster, batch_size: int, sent_bytes: int = FLOAT_BYTES
) -> RankLoad:
    """What one part of a table asks of the rank that holds it.

    Args:
        sharding: how the table is divided, as ``embeddings.sharding`` has it.
        batch_size: examples of each rank.
        sent_bytes: of a number on its way; 2 with ``embeddings.communication_precision``.

    Raises:
        ConfigError: another sharding; a table that every rank has a copy of is not divided.
    """
    if sharding not in ("table_wise", "row_wise", "column_wise"):
        raise ConfigError("sharding", expected="table_wise, row_wise or column_wise", received=sharding)
    by_row = sharding == "row_wise"
    examples, row_bytes = batch_size * cluster.num_ranks, shard.columns * FLOAT_BYTES
    state_bytes = shard.bytes / shard.rows - row_bytes if shard.rows else 0.0
    moved_row, moved_state = max(row_bytes, SECTOR_BYTES), max(state_bytes, SECTOR_BYTES) if state_bytes else 0.0
    load = RankLoad(shard.bytes)
    for lookup in lookups:
        ids = examples * lookup.ids / (cluster.num_ranks if by_row else 1)  # ids are spread evenly over the rows
        vectors = (examples if lookup.is_pooled else ids) * row_bytes
        # A bag whose rows lie on several ranks is a sum over all of them: each has a part of every bag.
        spread = cluster.ring if by_row and lookup.is_pooled else cluster.all_to_all
        forward = ids * (ID_BYTES + moved_row) + vectors
        backward = ids * (ID_BYTES + 2 * moved_row + 2 * moved_state) + vectors
        arriving = cluster.all_to_all(ids * ID_BYTES + examples * LENGTH_BYTES)
        load += RankLoad(0, ids * ID_BYTES + vectors, forward + backward, arriving, spread(vectors * sent_bytes / FLOAT_BYTES))
    return load


def step_cost(
    placements: Mapping[str, TablePlacement],
    lookups: Mapping[str, Sequence[Lookup]],
    cluster: Cluster,
    batch_size: int,
    dense_parameters: int = 0,
    sent_bytes: int = FLOAT_BYTES,
) -> StepCost:
    """A step of tables that lie as they do.

    Args:
        placements: by table; ``mlenv.loops.paper_plan`` has TorchRec's planner place them.
        lookups: by table.
        batch_size: examples of each rank.
        dense_parameters: numbers in what every rank has a copy of; each takes two multiplications and additions an example forward and
            four backward, as in layers that are matrix products.
        sent_bytes: see ``shard_load``.
    """
    ranks = [RankLoad() for _ in range(cluster.num_ranks)]
    for table, placement in placements.items():
        for shard in placement.shards:
            ranks[shard.rank] += shard_load(placement.sharding, shard, lookups[table], cluster, batch_size, sent_bytes)
    hardware, gradients = cluster.hardware, cluster.ring(dense_parameters * FLOAT_BYTES)
    dense = gradients + gradients  # an all-reduce is a reduce-scatter and an all-gather
    return StepCost(
        tuple(ranks),
        dense,
        {
            "ids": max(rank.ids.seconds(hardware) for rank in ranks),
            "rows": max(rank.memory_traffic for rank in ranks) / hardware.memory_bandwidth,
            "vectors": 2 * max(rank.vectors.seconds(hardware) for rank in ranks),
            "dense layers": 6 * dense_parameters * batch_size / hardware.operations,
            "dense gradients": dense.seconds(hardware),
        },
    )
