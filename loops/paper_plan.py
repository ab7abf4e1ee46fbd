"""Where TorchRec's planner would place tables on GPUs that are not here, and what it expects of them."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mlenv.config import EmbeddingsConfig
from mlenv.errors import ConfigError, require
from mlenv.loops.scaling_model import Cluster, Lookup
from mlenv.loops.sharding import constraints_of, fuse_optimizers, quiet
from mlenv.loops.table_memory import FLOAT_BYTES, TablePlacement, TableShard, state_bytes
from mlenv.modules import ENGINES
from mlenv.schema import Schema


@dataclass(frozen=True)
class ShardEstimate:
    """What the planner expects of a part of a table on the rank that holds it; milliseconds of a step."""

    rank: int
    bytes: int
    """The part, what its optimizer keeps, and the ids and vectors of a step."""
    milliseconds: dict[str, float]
    """As the planner divides a step: fwd_compute, fwd_comms, bwd_compute, bwd_comms, input_dist_comms, prefetch_compute."""


@dataclass(frozen=True)
class PaperPlan:
    """Where tables would lie, and the planner's estimates."""

    placements: dict[str, TablePlacement]
    estimates: dict[str, tuple[ShardEstimate, ...]]
    """By table, in the order of its shards."""

    @property
    def milliseconds(self) -> float:
        """Of a step on the rank that the planner thinks busiest; without the dense part, of which it knows nothing."""
        ranks: dict[int, float] = defaultdict(float)
        for shards in self.estimates.values():
            for shard in shards:
                ranks[shard.rank] += sum(shard.milliseconds.values())
        return max(ranks.values())


def paper_plan(
    schema: Schema, config: EmbeddingsConfig, lookups: Mapping[str, tuple[Lookup, ...]], cluster: Cluster, batch_size: int
) -> PaperPlan:
    """Plans without a process group and without the memory of the tables.

    Args:
        config: the optimizers, and the sharding of each table; where it names none the planner chooses between whole tables and
            divided rows.
        lookups: of every table, see ``mlenv.loops.scaling_model.lookups_of``.
        batch_size: examples of each rank.

    Raises:
        ConfigError: the planner finds no place for the tables.
        MlenvError: torchrec cannot be imported.
    """
    require("torchrec", extra="torchrec")
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.distributed.planner.types import PlannerError

    model = nn.ModuleDict({"embeddings": ENGINES["torchrec"](schema, config, 0)})
    fuse_optimizers(model, config)
    asked = constraints_of(config, {name: table.embedding_dim for name, table in schema.tables.items()}, cluster.num_ranks)
    free_choice = ParameterConstraints(sharding_types=["table_wise", "row_wise"])
    constraints = {
        table: replace(asked.get(table, free_choice), compute_kernels=["fused"], pooling_factors=[lookup.ids for lookup in lookups[table]])
        for table in schema.tables
    }
    hardware, milliseconds = cluster.hardware, 1e3
    sharders: list[Any] = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]
    with warnings.catch_warnings(), quiet("torchrec"), quiet(""):
        warnings.simplefilter("ignore")
        topology = Topology(
            world_size=cluster.num_ranks,
            local_world_size=cluster.local_ranks,
            compute_device="cuda",
            hbm_cap=int(hardware.memory_bytes),
            hbm_mem_bw=hardware.memory_bandwidth / milliseconds,
            intra_host_bw=hardware.host_bandwidth / milliseconds,
            inter_host_bw=hardware.network_bandwidth / milliseconds,
        )
        planner = EmbeddingShardingPlanner(topology=topology, batch_size=batch_size, constraints=constraints)
        try:
            planner.plan(model, sharders)
        except PlannerError as error:
            received = " ".join(str(error).split())[:300]
            raise ConfigError("embeddings.sharding", expected="a place for every table", received=received) from error
    placements, estimates = {}, {}
    for option in planner._best_plan or ():
        optimizer = config.of(option.name).optimizer
        placements[option.name] = TablePlacement(
            option.sharding_type,
            option.compute_kernel,
            tuple(
                TableShard(shard.rank, rows, columns, rows * columns * FLOAT_BYTES + state_bytes(optimizer, rows, columns))
                for shard in option.shards
                for rows, columns in [shard.size]
            ),
            option.total_perf,
        )
        estimates[option.name] = tuple(ShardEstimate(shard.rank, shard.storage.hbm, dict(vars(shard.perf))) for shard in option.shards)
    return PaperPlan(placements, estimates)
