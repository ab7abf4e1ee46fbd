"""A generated set in the shape of the Criteo logs: 26 categorical features with zipf ids, 13 numeric ones, one label, a row key."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlenv.schema import Categorical, Label, Numeric, Schema, Table

NUM_CATEGORICAL, NUM_NUMERIC, EMBEDDING_DIM = 26, 13, 16


def schema_of(num_embeddings: int, num_categorical: int = NUM_CATEGORICAL) -> Schema:
    """The schema for tables of ``num_embeddings`` rows each."""
    categorical = [f"C{number}" for number in range(num_categorical)]
    return Schema(
        features={**{name: Categorical() for name in categorical}, **{f"I{number}": Numeric() for number in range(NUM_NUMERIC)}},
        tables={name: Table(num_embeddings=num_embeddings, embedding_dim=EMBEDDING_DIM) for name in categorical},
        labels={"click": Label()},
        row_key=("row",),
    )


def write_set(
    folder: Path,
    num_rows: int,
    num_embeddings: int,
    row_group_rows: int = 65_536,
    seed: int = 0,
    num_categorical: int = NUM_CATEGORICAL,
) -> None:
    """Writes one Parquet file.

    Ids are zipf-distributed over the table, spread by a permutation, so that the frequent rows are not neighbours. The label follows
    from effects of single ids, of products of two ids' effects and of two numbers: something that a model can learn.
    """
    generator = np.random.default_rng(seed)
    columns, effects = {}, []
    for number in range(num_categorical):
        ranks = np.minimum(generator.zipf(1.1, num_rows) - 1, 2**62) % num_embeddings
        columns[f"C{number}"] = generator.permutation(num_embeddings)[ranks]
        effects.append(generator.normal(size=num_embeddings)[ranks])
    columns |= {f"I{number}": generator.normal(size=num_rows).astype(np.float32) for number in range(NUM_NUMERIC)}
    columns["row"] = np.arange(num_rows)
    alone, products = (
        np.sum(effects[:8], axis=0),
        sum(effects[place] * effects[place + 1] for place in range(8, min(num_categorical - 1, 16), 2)),
    )
    logits = -1.4 + 0.25 * alone + 0.25 * products + 0.3 * columns["I0"] + 0.3 * columns["I1"] * columns["I2"]
    columns["click"] = (generator.random(num_rows) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    pq.write_table(pa.table(columns), folder / "part-00000.parquet", row_group_size=row_group_rows)
