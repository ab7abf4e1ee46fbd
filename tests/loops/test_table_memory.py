"""Tables are weighed before they are made."""

from __future__ import annotations

import pytest
import torch

from mlenv import Experiment, compose
from mlenv.errors import ConfigError
from mlenv.loops.table_memory import check_memory, free_bytes, readable, replicated


@pytest.mark.parametrize("engine", ["torch", "torchrec"])
def test_tables_larger_than_the_memory_are_refused_before_it_is_taken(demo_arguments, engine):
    file, *settings = demo_arguments(f"embeddings.engine={engine}", "schema.tables.user.num_embeddings=200000000000")
    said = r"schema\.tables: expected tables that fit.*the most of it in user 1[12]\.\d+ TiB, .*Fix: lower"  # 2e11 rows of 16 numbers
    with Experiment(compose(file, settings)) as experiment, pytest.raises(ConfigError, match=said):
        _ = experiment.model


def test_optimizers_count(demo_arguments):
    file, *settings = demo_arguments(
        "embeddings.tables={user: {optimizer: adam, learning_rate: 0.1}, item: {optimizer: sgd, learning_rate: 1}}"
    )
    config = compose(file, settings)
    placements = replicated(config.schema.tables, config.embeddings)
    sizes = {table: placement.shards[0].bytes for table, placement in placements.items()}
    assert (sizes["user"], sizes["item"], sizes["hour"]) == (2000 * 16 * 3 * 4, 500 * 16 * 4, 24 * 17 * 4)
    check_memory(placements, sum(sizes.values()))
    with pytest.raises(ConfigError, match=r"that rank 0 has free.*in user 375 KiB, item"):
        check_memory(placements, sum(sizes.values()) - 1)


def test_free_memory_is_some_and_sizes_are_readable():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
    assert [readable(size) for size in (5, 1536, 3 * 2**30, 2**41)] == ["5 bytes", "1.5 KiB", "3 GiB", "2 TiB"]


def test_columns_are_divided_under_sgd_only(demo_arguments):
    file, *settings = demo_arguments("embeddings={engine: torchrec, tables: {user: {sharding: column_wise}}}")
    with pytest.raises(ValueError, match=r"embeddings\.tables\.user\.sharding: expected table_wise or row_wise, because row-wise Adagrad"):
        compose(file, settings)


def test_a_sharding_that_torchrec_does_not_have_here_is_refused(demo_arguments):
    file, *settings = demo_arguments("embeddings={engine: torchrec, tables: {user: {sharding: row_wise}}}")
    with (
        Experiment(compose(file, settings)) as experiment,
        pytest.raises(ConfigError, match=r"embeddings\.sharding: .* for user.*not of bags"),
    ):
        _ = experiment.model
