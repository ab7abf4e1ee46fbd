"""A generated set of 200 columns: 130 of ids, 50 of numbers and 20 sequences of ids; those of the Criteo shape are among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlenv.schema import Categorical, Feature, Label, Numeric, Schema, Sequence, SequenceField, Table

NUM_CATEGORICAL, NUM_NUMERIC, NUM_SEQUENCES = 130, 50, 20
SEQUENCE_LENGTH = 10
"""Of every row, because the loaders that ours is compared with take no lists of different lengths."""


def schema_of(num_embeddings: int) -> Schema:
    """The schema for tables of ``num_embeddings`` rows each."""
    features: dict[str, Feature] = {f"C{number}": Categorical() for number in range(NUM_CATEGORICAL)}
    features |= {f"I{number}": Numeric() for number in range(NUM_NUMERIC)}
    features |= {f"S{number}": Sequence(fields={"item": SequenceField(table=f"S{number}")}) for number in range(NUM_SEQUENCES)}
    tables = [*(f"C{number}" for number in range(NUM_CATEGORICAL)), *(f"S{number}" for number in range(NUM_SEQUENCES))]
    return Schema(
        features=features,
        tables={name: Table(num_embeddings=num_embeddings, embedding_dim=16) for name in tables},
        labels={"click": Label()},
        row_key=("row",),
    )


def write_set(folder: Path, num_rows: int, num_embeddings: int, row_group_rows: int = 16_384, seed: int = 0) -> None:
    """Writes one Parquet file; ids are zipf-distributed over the table."""
    generator = np.random.default_rng(seed)

    def ids(number: int) -> pa.Array:
        return pa.array(np.minimum(generator.zipf(1.1, number) - 1, 2**62) % num_embeddings)

    columns = {f"C{number}": ids(num_rows) for number in range(NUM_CATEGORICAL)}
    columns |= {f"I{number}": pa.array(generator.normal(size=num_rows).astype(np.float32)) for number in range(NUM_NUMERIC)}
    offsets = pa.array(np.arange(num_rows + 1, dtype=np.int32) * SEQUENCE_LENGTH)
    lists = (pa.ListArray.from_arrays(offsets, ids(num_rows * SEQUENCE_LENGTH)) for _ in range(NUM_SEQUENCES))
    columns |= {f"S{number}_item": sequence for number, sequence in enumerate(lists)}
    columns |= {"row": pa.array(np.arange(num_rows)), "click": pa.array((generator.random(num_rows) < 0.25).astype(np.int8))}
    pq.write_table(pa.table(columns), folder / "part-00000.parquet", row_group_size=row_group_rows)
