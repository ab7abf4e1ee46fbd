"""Segment columns as texts, and texts as the codes that calibrators by segment read."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlenv.errors import DataError


def segment_texts(metadata: pa.RecordBatch | None, column: str) -> pa.Array:
    """A segment column as text, as the metrics name its values."""
    names = metadata.schema.names if metadata is not None else []
    if metadata is None or column not in names:
        fix = "add the column to schema.segments"
        raise DataError("metadata of the batch", expected=f"the column {column!r} for the calibrator", received=names, fix=fix)
    values = metadata.column(column)
    return (values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values).cast(pa.string())


def segment_codes(texts: pa.Array | pa.ChunkedArray, values: tuple[str, ...]) -> NDArray[np.int64]:
    """``(rows,)``: 0 for null and unknown values, otherwise the place in ``values``, from 1 on."""
    places = pc.fill_null(pc.index_in(texts, value_set=pa.array(values, pa.string()), skip_nulls=True), -1)
    codes: NDArray[np.int64] = places.to_numpy().astype(np.int64) + 1
    return codes
