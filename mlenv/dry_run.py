"""Finding out whether a config can be trained: without its data, or with their columns only, and without the memory of its tables."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch

from mlenv.batch import Extra, example_batch
from mlenv.checks.backfill_checks import check_pairs
from mlenv.config import EmbeddingsConfig, ExperimentConfig
from mlenv.datasets.parquet_source import NoFilesError, ParquetSource
from mlenv.loops.compilation import owner_of_dense_part
from mlenv.modules import Objective, TorchEmbeddings
from mlenv.modules.distillation import Teach
from mlenv.modules.logits import check_logits
from mlenv.schema import Table


def check_data(config: ExperimentConfig) -> None:
    """Compares the columns of the files with the schema and the transforms. Days that are not there yet are not missed.

    Raises:
        Problems, DataError: see ParquetSource.
        ConfigError: a table that is joined is not there or cannot be used.
    """
    data = replace(config.data, allow_missing_days=True)
    for name, window in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if window is not None:
            with suppress(NoFilesError):
                extras: tuple[Extra, ...] = () if name == "train" else ("metadata",)
                source = ParquetSource(data, window, config.schema, is_training=name == "train", extras=extras)
                check_pairs(source, config.checks)


def check_parts(config: ExperimentConfig) -> None:
    """Builds the model over tables of one row each and what it is measured by, runs both over rows without features, drops all.

    Raises:
        ConfigError: the model does not fit the schema, parts of it do not fit each other, or the teacher does not fit either; there
            is no checkpoint to begin with, or no driver for the URL of the checkpoints.
        CheckpointError: the teacher's checkpoint is damaged, or the one to begin with.
    """
    schema = config.schema
    tables = {
        name: Table(num_embeddings=1, embedding_dim=table.embedding_dim, ids="hash", pooling=table.pooling)
        for name, table in schema.tables.items()
    }
    small = replace(schema, tables=tables)
    model = config.model.build(small, TorchEmbeddings(small, EmbeddingsConfig(), seed=0))
    if config.loop.compile != "none":
        owner_of_dense_part(model)
    probe = example_batch(schema)
    with torch.no_grad():
        check_logits(model.eval()(probe), probe)
    teach = _teach(config)
    _check_checkpoints(config)
    objective = Objective(config.objective, schema.tasks, model, teach=teach, probe=probe)
    objective.backward(objective(model.train()(probe), probe), torch.Tensor.backward)


def _teach(config: ExperimentConfig) -> Teach | None:
    if config.objective.distillation is None:
        return None
    from mlenv.teacher import teacher_of  # what reads checkpoints takes as long to import as torch

    return teacher_of(config.objective.distillation, config.schema, torch.device("cpu"), config.tracking.uri)


def _check_checkpoints(config: ExperimentConfig) -> None:
    if config.loop.checkpoint_url:
        from mlenv.loops.checkpoint_store import CheckpointStore

        CheckpointStore(config.loop.checkpoint_url)
    if config.warm_start is not None:
        from mlenv.warm_start import WarmStart

        WarmStart(config.warm_start, config.schema, config.tracking.uri).verify()
