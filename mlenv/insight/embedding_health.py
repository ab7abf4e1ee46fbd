"""Whether embedding tables are used as they are meant to be: rows never trained, rows that died, ids that share a row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlenv.config import EmbeddingsConfig
from mlenv.datasets.encoding import encode_features
from mlenv.datasets.parquet_source import ParquetSource
from mlenv.inference.stored_model import read_sections
from mlenv.loops.checkpoint import load_tensors, stored_shapes
from mlenv.modules import TorchEmbeddings
from mlenv.modules.embeddings import fill_initial_rows
from mlenv.schema import Schema, Table

DEAD_SHARE: Final = 0.01
"""A trained row is dead when it is shorter than this share of the median trained row of its table."""
TOP_SHARE: Final = 0.01
"""Of the rows of a table, at least one: how much of all lookups they take."""
QUANTILES: Final = (0.01, 0.5, 0.99)

_PLENTY: Final = 1 << 62
"""Rows of an imagined table in which no two ids meet."""
_BLOCK_ROWS: Final = 65_536

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class InitialSections:
    """What of a checkpoint's config says how its tables began."""

    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TableHealth:
    """One embedding table, and what the rows of a window look up in it."""

    table: str
    num_rows: int
    dim: int
    norms: tuple[float, ...]
    """Lengths of the trained rows at ``QUANTILES``; nan where none is trained."""
    untrained: float
    """Share of the rows that training never touched: their optimizer state is zero, or where the checkpoint keeps none of theirs,
    they are what they began as, to the bit."""
    dead: float
    """Share of the rows that were trained to next to nothing."""
    lookups: int
    used: float
    """Share of the rows that the window looks up."""
    top: float
    """Share of the lookups that ``TOP_SHARE`` of the rows take."""
    unseen: float
    """Share of the lookups that find a row that was never trained."""
    ids: int | None
    """Different ids of the window; None where the table hashes none."""
    colliding: float | None
    """Share of these ids that share their row with another of them."""


def table_healths(model: nn.Module, checkpoint: Path, source: ParquetSource, *, at_most: int = 1_000_000) -> list[TableHealth]:
    """
    Args:
        checkpoint: of the model.
        source: whose rows are looked up.
        at_most: rows, about; row groups are then spread over the window.
    """
    schema = source.schema
    if not schema.tables:
        return []
    embeddings = next(module for module in model.modules() if isinstance(module, TorchEmbeddings))
    uses = _Uses(schema)
    for rows in source.record_batches(schema.feature_columns, at_most=at_most):
        uses.update(rows)
    sections = read_sections(checkpoint, InitialSections)
    stored = stored_shapes(checkpoint)
    healths = []
    for name, table in schema.tables.items():
        weight = embeddings.tables[name].weight
        assert isinstance(weight, Tensor)
        states = [key for key in stored if key.startswith("optimizer.") and key.endswith(f".tables.{name}.weight.sum")]
        if states and stored[states[0]] == (table.num_embeddings,):
            state = torch.empty(table.num_embeddings)
            load_tensors(checkpoint, {states[0]: state})
            untrained = state.numpy() == 0
        else:
            untrained = _as_at_the_start(weight.cpu(), name, sections)
        healths.append(_health(name, table, weight.cpu().norm(dim=1).numpy(), untrained, uses))
    return healths


class _Uses:
    """Counts lookups by row, and gathers ids of tables that hash."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._hashing = [name for name, table in schema.tables.items() if table.ids == "hash" or table.out_of_range == "hash"]
        tables = {name: replace(table, num_embeddings=_PLENTY) if name in self._hashing else table for name, table in schema.tables.items()}
        self._without_collisions = replace(schema, tables=tables)
        self.lookups = {name: np.zeros(table.num_embeddings, np.int64) for name, table in schema.tables.items()}
        self.ids = {name: np.zeros((0, 2), np.int64) for name in self._hashing}
        """Each id of a hashing table once: what it is without collisions, and its row."""

    def update(self, rows: pa.RecordBatch) -> None:
        found, plain = (encode_features(rows, schema)[0] for schema in (self._schema, self._without_collisions))
        pairs: dict[str, list[Ints]] = {}
        for key, bags, ids in zip(self._schema.sparse_keys, found, plain, strict=True):
            self.lookups[key.table] += np.bincount(bags.values, minlength=len(self.lookups[key.table]))
            if key.table in self.ids:
                pairs.setdefault(key.table, []).append(np.stack([ids.values, bags.values], axis=1))
        for table, some in pairs.items():
            self.ids[table] = np.unique(np.concatenate([self.ids[table], *some]), axis=0)


def _health(name: str, table: Table, norms: NDArray[np.float32], untrained: NDArray[np.bool_], uses: _Uses) -> TableHealth:
    trained, lookups = norms[~untrained], uses.lookups[name]
    total = int(lookups.sum())
    top = np.sort(lookups)[-max(1, int(TOP_SHARE * len(lookups))) :].sum()
    colliding = None
    if name in uses.ids:
        rows = uses.ids[name][:, 1]
        colliding = float((np.bincount(rows)[rows] > 1).mean()) if len(rows) else 0.0
    return TableHealth(
        table=name,
        num_rows=table.num_embeddings,
        dim=table.embedding_dim,
        norms=tuple(np.quantile(trained, QUANTILES).tolist()) if len(trained) else (float("nan"),) * len(QUANTILES),
        untrained=float(untrained.mean()),
        dead=float((trained < DEAD_SHARE * np.median(trained)).sum() / len(norms)) if len(trained) else 0.0,
        lookups=total,
        used=float((lookups > 0).mean()),
        top=float(top / total) if total else 0.0,
        unseen=float(lookups[untrained].sum() / total) if total else 0.0,
        ids=len(uses.ids[name]) if name in uses.ids else None,
        colliding=colliding,
    )


def _as_at_the_start(weight: Tensor, table: str, sections: InitialSections) -> NDArray[np.bool_]:
    parts = []
    for first in range(0, len(weight), _BLOCK_ROWS):
        rows = weight[first : first + _BLOCK_ROWS]
        initial = torch.empty_like(rows)
        fill_initial_rows(initial, first, table, sections.embeddings.init_std, sections.seed)
        parts.append((rows == initial).all(1).numpy())
    return np.concatenate(parts)
