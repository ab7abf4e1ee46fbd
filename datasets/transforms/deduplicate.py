"""Drops rows that came before, in whatever file of the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlenv.config import Findings
from mlenv.datasets.hashing import hash_rows
from mlenv.datasets.transforms.expressions import require_columns
from mlenv.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DeduplicateConfig:
    """Keeps the first row, in the order of the files, of those that agree in ``columns``.

    The columns of the whole window are read once before the training. Rows are told apart by a hash of 64 bits: 8 bytes a row
    of the window are held while they are gathered and about 32 while they are sorted, 8 a dropped row afterwards. Among a
    hundred million rows the chance that a single one is taken for another is 0.03 %.
    """

    columns: tuple[str, ...]
    """Columns that make two rows the same: those of a request and an item, or all that tell rows apart."""
    when: Literal["always", "train"] = "always"
    """train leaves held-out rows alone."""

    drops_rows: ClassVar[bool] = True
    sampling_seed: ClassVar[int | None] = None
    writes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not self.columns:
            raise ConfigError("columns", expected="at least one column", received=[])

    @property
    def reads(self) -> tuple[str, ...]:
        return self.columns

    def held_out(self) -> DeduplicateConfig | None:
        return self if self.when == "always" else None

    def output_schema(self, columns: pa.Schema) -> pa.Schema:
        require_columns(self.columns, columns, "columns")
        return columns

    def survey(self, rows: pa.RecordBatch) -> NDArray[np.uint64]:
        return hash_rows([rows.column(name) for name in self.columns])

    def conclude(self, surveys: Sequence[NDArray[np.uint64]]) -> Findings:
        hashes = np.concatenate(surveys)
        order = np.argsort(hashes, kind="stable")
        again = np.zeros(len(hashes), bool)
        again[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
        ends = np.cumsum([len(survey) for survey in surveys])[:-1]
        return Findings([np.flatnonzero(part) for part in np.split(again, ends)])
