"""List columns of Arrow: their lengths, and maps as the lists that they are."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def as_list(column: pa.Array) -> pa.Array:
    """A map as a list of pairs, which is what it is in memory; a list as it is."""
    if not pa.types.is_map(column.type):
        return column
    return column.cast(pa.list_(pa.struct([("key", column.type.key_type), ("value", column.type.item_type)])))


def list_lengths(column: pa.Array) -> NDArray[np.int64]:
    """Elements per row; none in a null list."""
    lengths: NDArray[np.int64] = pc.fill_null(pc.list_value_length(column), 0).cast(pa.int64()).to_numpy()
    return lengths
