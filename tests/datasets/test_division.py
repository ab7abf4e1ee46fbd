"""No row is lost or trained twice when the number of ranks changes, at whatever step and however often."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlenv.batch import START, Position
from mlenv.config import DataConfig, WindowConfig
from mlenv.datasets.division import Division, Piece, divide_anew, division_from
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.schema import Categorical, Label, Schema, Table

SCHEMA = Schema(
    features={"item": Categorical()},
    tables={"item": Table(num_embeddings=1000, embedding_dim=2)},
    labels={"click": Label()},
    row_key=("key",),
)
ROWS, EPOCHS = 333, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    table = pa.table({"key": np.arange(ROWS), "item": np.arange(ROWS), "click": np.zeros(ROWS, int)})
    pq.write_table(table, folder / "part.parquet", row_group_size=20)
    return folder


def sources(folder, num_ranks, division, shuffle_rows=50):
    config = DataConfig(path=str(folder), train=WindowConfig(), batch_size=8, shuffle_rows=shuffle_rows)
    options = {"is_training": True, "shuffle": True, "seed": 1, "num_epochs": EPOCHS, "extras": ("metadata",), "world_size": num_ranks}
    made = [ParquetSource(config, WindowConfig(), SCHEMA, rank=rank, **options) for rank in range(num_ranks)]
    for source in made:
        source.division = division
    return made


def train(made, positions, num_steps):
    """What the ranks read in so many steps, and where they are then."""
    keys, after = Counter(), []
    for source, start in zip(made, positions, strict=True):
        position = start
        for _, batch in zip(range(num_steps), source.batches(start), strict=False):
            keys.update(batch.metadata.column("key").to_pylist())
            position = batch.position
        after.append(position)
    return keys, after


@settings(max_examples=25)
@given(
    ranks=st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=4),
    steps=st.lists(st.integers(0, 30), min_size=3, max_size=3),
    shuffle_rows=st.sampled_from([1, 50, 1000]),
)
def test_every_row_is_trained_once_an_epoch(folder, ranks, steps, shuffle_rows):
    division, positions, step = Division(), [START] * ranks[0], 0
    trained = Counter()
    for place, num_ranks in enumerate(ranks):
        made = sources(folder, num_ranks, division, shuffle_rows)
        if num_ranks != len(positions):
            division = divide_anew(division, positions, step, num_ranks, made[0].rows_of_windows)
            assert division_from(json.loads(json.dumps(dataclasses.asdict(division)))) == division
            positions = [division.start] * num_ranks
            for source in made:
                source.division = division
            assert sum(source.num_own_rows for source in made) == EPOCHS * ROWS - trained.total()
        is_last = place == len(ranks) - 1
        keys, positions = train(made, positions, 10**6 if is_last else steps[place])
        trained += keys
        step += steps[place] if not is_last else 0
    assert trained == Counter(dict.fromkeys(range(ROWS), EPOCHS))


def test_what_is_left_is_dealt_evenly_and_later_epochs_are_as_ever(folder):
    before = sources(folder, 2, Division())
    _, positions = train(before, [START, START], 5)
    division = divide_anew(Division(), positions, 5, 3, before[0].rows_of_windows)
    after = sources(folder, 3, division)
    rows = [sum(piece.last - piece.first for piece in pieces) for pieces in division.pieces]
    assert sum(rows) == ROWS - 2 * 5 * 8
    assert max(rows) - min(rows) <= 60  # a window has 60 rows here, of three row groups
    assert (division.step, division.epoch, division.start) == (5, 0, Position(0, 0, 0))
    for later, new in zip(after, sources(folder, 3, Division()), strict=True):
        expected = next(new.batches(Position(1))).metadata.column("key").to_pylist()
        assert next(later.batches(Position(1))).metadata.column("key").to_pylist() == expected


def test_pieces_by_hand():
    rows = {0: [10, 10], 1: [10, 4]}
    division = divide_anew(Division(), [Position(0, 1, 3), Position(0, 0, 10)], 7, 3, lambda epoch, rank, number: rows[rank])
    # Left are rows 3 to 10 of the second window of rank 0 and all 4 of that of rank 1: each of three ranks has a part of both.
    assert division == Division(
        7,
        0,
        (
            (Piece(0, 1, 0, 2, 3, 5), Piece(0, 1, 1, 2, 0, 1)),
            (Piece(0, 1, 0, 2, 5, 7), Piece(0, 1, 1, 2, 1, 2)),
            (Piece(0, 1, 0, 2, 7, 10), Piece(0, 1, 1, 2, 2, 4)),
        ),
    )
    # Rank 1 has begun the next epoch, rank 0 has not: one of both is divided anew.
    division = divide_anew(Division(), [Position(0, 1, 9), Position(1, 0, 8)], 9, 1, lambda epoch, rank, number: rows[rank])
    expected = (
        Piece(0, 1, 0, 2, 9, 10),
        Piece(1, 0, 0, 2, 0, 10),
        Piece(1, 0, 1, 2, 8, 10),
        Piece(1, 1, 0, 2, 0, 10),
        Piece(1, 1, 1, 2, 0, 4),
    )
    assert division == Division(9, 1, (expected,))
