"""From raw feature values to predictions, as a package says: mlenv's own encoding, then the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mlenv.datasets.encoded_rows import Floats, Integers
from mlenv.datasets.encoding import RowError, encode_features
from mlenv.datasets.segments import segment_codes, segment_texts
from mlenv.serving.columns import RowProblem, RowsError, from_rows
from mlenv.serving.inputs import PADDING_ROWS, GraphInputs, graph_inputs
from mlenv.serving.package import Format, Package
from mlenv.serving.runtimes import load_runtime

LARGEST_RUN = 4096
"""Rows that go through the graph at once; more are cut."""


class Predictor:
    """Scores rows with a package; may be called from several threads.

    Args:
        form, num_threads: see load_runtime.
    """

    def __init__(self, package: Package, form: Format | None = None, num_threads: int = 0) -> None:
        self.package = package
        self.run = load_runtime(package, form, num_threads)

    @property
    def tasks(self) -> tuple[str, ...]:
        """In the order of the columns of the predictions."""
        return self.package.schema.tasks

    def predict_rows(self, rows: Sequence[Mapping[str, Any]]) -> Floats:
        """Predictions ``(rows, tasks)`` for rows of JSON.

        Raises:
            RowsError: a field is missing or cannot be used.
        """
        return self.predict(from_rows(rows, self.package.columns))

    def predict(self, rows: pa.RecordBatch) -> Floats:
        """Predictions ``(rows, tasks)`` for the columns of the package.

        Raises:
            RowsError: a value cannot be used.
        """
        parts = [self._predict(rows.slice(first, LARGEST_RUN), first) for first in range(0, rows.num_rows, LARGEST_RUN)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.tasks)), np.float32)

    def inputs(self, rows: pa.RecordBatch, first_row: int = 0) -> GraphInputs:
        """What the graph takes for these rows; ``first_row`` is the number of the first one in the request."""
        schema = self.package.schema
        rows = self.package.transforms.apply(rows, first_row)
        try:
            sparse, dense = encode_features(rows, schema)
        except RowError as error:
            problem = RowProblem(first_row + error.row, error.column, error.expected, repr(error.received))
            raise RowsError([problem]) from error
        return graph_inputs(schema, sparse, dense, self._codes(rows))

    def _predict(self, rows: pa.RecordBatch, first_row: int) -> Floats:
        return self.run(self.inputs(rows, first_row))[:-PADDING_ROWS]

    def _codes(self, rows: pa.RecordBatch) -> Integers:
        """Codes of the segment columns, task by task."""
        columns = [
            segment_codes(segment_texts(rows, column), values)
            for task in self.tasks
            for column, values in self.package.segments.get(task, {}).items()
        ]
        return np.stack(columns, axis=1) if columns else np.zeros((rows.num_rows, 0), np.int64)
