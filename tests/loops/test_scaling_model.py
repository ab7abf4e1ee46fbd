"""The model on paper beside counts by hand, a slow walk over all links, and TorchRec's planner."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from mlenv.config import EmbeddingsConfig
from mlenv.config.embeddings import TableConfig
from mlenv.errors import ConfigError
from mlenv.loops.paper_plan import PaperPlan, paper_plan
from mlenv.loops.scaling_model import H100, Cluster, Lookup, Sent, lookups_of, shard_load, step_cost
from mlenv.loops.table_memory import TablePlacement, TableShard
from mlenv.schema import Categorical, Label, MultiCategorical, Schema, Sequence, SequenceField, Table

BATCH = 1000
SCHEMA = Schema(
    features={
        "whole": MultiCategorical(),
        "by_row": MultiCategorical(),
        "by_column": Categorical(),
        "again": Categorical(table="whole"),
        "seen": Sequence(fields={"item": SequenceField(table="item"), "shop": SequenceField(table="shop")}),
    },
    tables={
        "whole": Table(num_embeddings=50_000, embedding_dim=16),
        "by_row": Table(num_embeddings=640_001, embedding_dim=128),
        "by_column": Table(num_embeddings=90_000, embedding_dim=256),
        "item": Table(num_embeddings=70_000, embedding_dim=64),
        "shop": Table(num_embeddings=64_000, embedding_dim=64),
    },
    labels={"click": Label()},
)
LOOKUPS = lookups_of(SCHEMA, {"whole": 5, "by_row": 20, "seen.item": 30, "seen.shop": 30})
EMBEDDINGS = EmbeddingsConfig(
    engine="torchrec",
    sharding="table_wise",
    tables={
        "by_row": TableConfig(sharding="row_wise"),
        "by_column": TableConfig(sharding="column_wise", optimizer="sgd", learning_rate=1.0),
        "shop": TableConfig(sharding="row_wise"),
    },
)
Planned = tuple[Cluster, PaperPlan]


@pytest.fixture(scope="module", params=[8, 64])
def planned(request: pytest.FixtureRequest) -> Planned:
    cluster = Cluster(num_ranks=request.param)
    return cluster, paper_plan(SCHEMA, EMBEDDINGS, LOOKUPS, cluster, BATCH)


def parts(planned: Planned):
    """Table, part, what the model has it do, and what the planner expects of it."""
    cluster, plan = planned
    for table, placement in plan.placements.items():
        for shard, estimate in zip(placement.shards, plan.estimates[table], strict=True):
            yield table, shard_load(placement.sharding, shard, LOOKUPS[table], cluster, BATCH), estimate


def test_every_number_is_somewhere(planned):
    cluster, plan = planned
    for table, placement in plan.placements.items():
        whole, optimizer = SCHEMA.tables[table], EMBEDDINGS.of(table).optimizer
        assert placement.sharding == EMBEDDINGS.of(table).sharding
        assert sum(shard.rows * shard.columns for shard in placement.shards) == whole.num_embeddings * whole.embedding_dim
        numbers = whole.num_embeddings * (whole.embedding_dim + (optimizer == "row_wise_adagrad"))
        assert sum(shard.bytes for shard in placement.shards) == numbers * 4
    assert {len(plan.placements[table].shards) for table in ("by_row", "shop")} == {cluster.num_ranks}


def test_memory_is_the_planners_to_the_byte(planned):
    for table, load, estimate in parts(planned):
        assert estimate.bytes == pytest.approx(load.table_bytes + load.buffer_bytes, abs=3), table  # it rounds three numbers up


def test_vectors_are_what_the_planner_sends_but_for_what_stays_and_what_rings_share(planned):
    """The planner has everything leave, also what a rank sends to itself, and all of it over the slower link."""
    cluster, _ = planned
    hosts, bandwidth = cluster.num_ranks // 8, H100.host_bandwidth if cluster.num_ranks == 8 else H100.network_bandwidth
    leaving = 7 / 8 if hosts == 1 else 56 / 64
    of_ring = 7 / 8 if hosts == 1 else 63 / 64 / 8  # over the card of each of the eight GPUs of a host
    for table, load, estimate in parts(planned):
        size = estimate.milliseconds["fwd_comms"] / 1e3 * bandwidth
        own = load.vectors.host if hosts == 1 else load.vectors.network
        assert own == pytest.approx(size * (of_ring if table == "by_row" else leaving), rel=1e-6), table
        back = estimate.milliseconds["bwd_comms"] - (size * 2.455 / H100.memory_bandwidth * 1e3 if table in ("by_row", "shop") else 0)
        assert back == pytest.approx(estimate.milliseconds["fwd_comms"], rel=1e-6), table  # it copies gradients of rows once more


def test_ids_are_what_the_planner_sends_but_for_lengths_and_divided_rows(planned):
    """The planner leaves the lengths of bags out, and sends all ids to every part of a table of divided rows."""
    cluster, plan = planned
    bandwidth = H100.host_bandwidth if cluster.num_ranks == 8 else H100.network_bandwidth
    for table, load, estimate in parts(planned):
        size = estimate.milliseconds["input_dist_comms"] / 1e3 * bandwidth
        size /= cluster.num_ranks if plan.placements[table].sharding == "row_wise" else 1
        lengths = len(LOOKUPS[table]) * BATCH * cluster.num_ranks * 4
        own = load.ids.host if cluster.num_ranks == 8 else load.ids.network
        assert own == pytest.approx((size + lengths) * 7 / 8, rel=1e-6), table  # 56 of 64 ranks are on other hosts, 7 of 8 on this one


def test_lookups_take_the_planner_up_to_three_times_as_long_or_six_for_narrow_parts(planned):
    """It reads at least 32 numbers of a row, multiplies rows of less than 128 by 1.15 to 1.75, and has the backward pass take twice as long
    as the forward one."""
    cluster, plan = planned
    for table, load, estimate in parts(planned):
        theirs = estimate.milliseconds["fwd_compute"] + estimate.milliseconds["bwd_compute"]
        most = 6 if plan.placements[table].shards[0].columns < 16 else 3
        assert 1 <= theirs / (load.memory_traffic / cluster.hardware.memory_bandwidth * 1e3) <= most, table


def test_a_part_by_hand():
    """Two hosts of two ranks with 10 examples each; 100 rows of 4 numbers with a number of Adagrad's each."""
    cluster = Cluster(num_ranks=4, ranks_per_host=2)
    whole = shard_load("table_wise", TableShard(0, 100, 4, 2000), [Lookup(3)], cluster, 10)
    assert (whole.table_bytes, whole.buffer_bytes) == (2000, 120 * 8 + 40 * 16)
    assert whole.ids == Sent(30 * 8 + 10 * 4, 60 * 8 + 20 * 4)  # of one other rank here, of two there
    assert whole.vectors == Sent(10 * 16, 20 * 16)
    forward, backward = 120 * (8 + 32) + 40 * 16, 120 * (8 + 4 * 32) + 40 * 16  # rows and Adagrad's numbers lie in sectors of 32 bytes
    assert whole.memory_traffic == forward + backward
    quarter = shard_load("row_wise", TableShard(0, 25, 4, 500), [Lookup(3)], cluster, 10)
    assert quarter.ids == Sent(30 / 4 * 8 + 10 * 4, 60 / 4 * 8 + 20 * 4)
    assert quarter.vectors == Sent(40 * 16 * 3 / 4 / 2, 40 * 16 * 3 / 4 / 2)  # a part of every bag, by two rings
    events = shard_load("row_wise", TableShard(0, 25, 4, 500), [Lookup(3, is_pooled=False)], cluster, 10)
    assert events.vectors == Sent(30 / 4 * 16, 60 / 4 * 16)  # a row is sent by the one rank that has it
    halved = shard_load("row_wise", TableShard(0, 25, 4, 500), [Lookup(3)], cluster, 10, sent_bytes=2)
    assert halved == replace(quarter, vectors=Sent(quarter.vectors.host / 2, quarter.vectors.network / 2))
    nothing = shard_load("row_wise", TableShard(3, 0, 4, 0), [Lookup(1)], cluster, 10)
    assert nothing.vectors.host > 0, "a rank without rows takes part with zeros"


@pytest.mark.parametrize(("ranks", "per_host"), [(1, 8), (4, 8), (8, 4), (12, 3)])
def test_links_as_a_walk_over_them_counts(ranks, per_host):
    cluster, size = Cluster(num_ranks=ranks, ranks_per_host=per_host), 1200.0
    local = min(ranks, per_host)
    pairs: Counter[bool] = Counter()
    for other in range(1, ranks):  # from rank 0
        pairs[other // local > 0] += size / ranks
    assert cluster.all_to_all(size) == Sent(pytest.approx(pairs[False]), pytest.approx(pairs[True]))
    sent: Counter[tuple[int, bool]] = Counter()
    for first in range(local):  # a ring visits the ranks of a host one by one from another first one, then the next host
        ring = [host * local + (first + place) % local for host in range(ranks // local) for place in range(local)]
        for here, there in zip(ring, [*ring[1:], ring[0]], strict=True):
            sent[here, here // local != there // local] += size / local * (ranks - 1) / ranks
    for rank in range(ranks):
        assert cluster.ring(size) == Sent(pytest.approx(sent[rank, False]), pytest.approx(sent[rank, True]))


def test_a_step_is_as_slow_as_its_busiest_rank():
    cluster = Cluster(num_ranks=16)
    one = TablePlacement("table_wise", "fused", (TableShard(3, 1000, 128, 1000 * 128 * 4),))
    other = replace(one, shards=(replace(one.shards[0], rank=5),))
    lookups = {"a": (Lookup(1),), "b": (Lookup(1),)}
    apart = step_cost({"a": one, "b": other}, lookups, cluster, BATCH, dense_parameters=10_000_000)
    together = step_cost({"a": one, "b": one}, lookups, cluster, BATCH)
    assert together.table_bytes == 2 * apart.table_bytes == 2 * 1000 * 128 * 4
    assert together.seconds["vectors"] == pytest.approx(2 * apart.seconds["vectors"])
    assert apart.seconds["vectors"] == pytest.approx(2 * 8 * BATCH * 128 * 4 / 50e9)  # to the eight ranks of the other host, and back
    assert apart.seconds["dense gradients"] == pytest.approx(max(2 * 40e6 * 15 / 16 * 7 / 8 / 450e9, 2 * 40e6 * 15 / 16 / 8 / 50e9))
    assert apart.seconds["dense layers"] == pytest.approx(6 * 1e7 * BATCH / 67e12)
    assert apart.total_seconds == pytest.approx(sum(apart.seconds.values()))
    assert (apart.bottleneck, together.bottleneck) == ("dense layers", "vectors")
    assert together.network_bytes == pytest.approx(2 * 8 * BATCH * (8 + 4 + 2 * 128 * 4))


def test_one_rank_sends_nothing():
    placement = TablePlacement("table_wise", "fused", (TableShard(0, 10, 4, 160),))
    alone = step_cost({"a": placement}, {"a": (Lookup(1),)}, Cluster(num_ranks=1), BATCH, dense_parameters=5)
    assert (alone.host_bytes, alone.network_bytes) == (0, 0)


def test_what_is_not_known_is_asked_for():
    with pytest.raises(ConfigError, match=r"ids_per_example: expected the mean length of whole, by_row, seen\.item, seen\.shop"):
        lookups_of(SCHEMA)
    with pytest.raises(ConfigError, match=r"ids_per_example: expected keys of the schema: whole, .* Received: \['wole'\]"):
        lookups_of(SCHEMA, {"wole": 5})
    with pytest.raises(ConfigError, match="num_ranks: expected a multiple of the 8 ranks of a host"):
        Cluster(num_ranks=12)
    with pytest.raises(ConfigError, match="memory_bandwidth"):
        replace(H100, memory_bandwidth=0)
    with pytest.raises(ConfigError, match=r"sharding: expected table_wise, row_wise or column_wise\. Received: 'replicated'"):
        shard_load("replicated", TableShard(0, 1, 4, 16), [Lookup(1)], Cluster(num_ranks=1), 1)


def test_tables_that_fit_nowhere_are_refused():
    small = Cluster(num_ranks=8, hardware=replace(H100, memory_bytes=1e8))
    with pytest.raises(ConfigError, match=r"embeddings\.sharding: expected a place for every table"):
        paper_plan(SCHEMA, EMBEDDINGS, LOOKUPS, small, BATCH)
