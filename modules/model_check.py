"""Finding out whether a model can be built, without the memory of its tables."""

from __future__ import annotations

from dataclasses import replace

from mlenv.config import EmbeddingsConfig, ModelConfig
from mlenv.modules.embeddings import TorchEmbeddings
from mlenv.schema import Schema, Table


def check_model(model: ModelConfig, schema: Schema) -> None:
    """Builds a model over tables of one row each and drops it.

    Raises:
        ConfigError: the model does not fit the schema, or parts of it do not fit each other.
    """
    tables = {
        name: Table(num_embeddings=1, embedding_dim=table.embedding_dim, ids="hash", pooling=table.pooling)
        for name, table in schema.tables.items()
    }
    small = replace(schema, tables=tables)
    model.build(small, TorchEmbeddings(small, EmbeddingsConfig(), seed=0))
