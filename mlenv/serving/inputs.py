"""From encoded features to the arrays that a served graph takes. No torch here: ONNX Runtime needs none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlenv.datasets.encoded_rows import Floats, Integers, Jagged
from mlenv.schema import Schema

PADDING_ROWS = 2
"""Rows that stand behind those of a request, so that no size is 0 or 1: a tracer takes such a size for another program."""


class GraphInputs(NamedTuple):
    """Arguments of ``ServedGraph.forward`` in their order, the padding rows included."""

    ids: list[Integers]
    lengths: NDArray[np.int32]
    weights: list[Floats]
    dense: Floats
    codes: Integers


def graph_inputs(schema: Schema, sparse: Sequence[Jagged], dense: Sequence[Floats], codes: Integers) -> GraphInputs:
    """
    Args:
        sparse: in the order of ``schema.sparse_keys``.
        dense: in the order of ``schema.dense_columns``.
        codes: ``(rows, segment columns)``.
    """
    rows = len(codes)
    ids, weights = [], []
    lengths = np.ones((len(sparse), rows + PADDING_ROWS), np.int32)
    for place, (key, jagged) in enumerate(zip(schema.sparse_keys, sparse, strict=True)):
        lengths[place, :rows] = jagged.lengths(rows)
        values = _one_per_row(jagged, rows) if key.group == "single" else jagged.values
        ids.append(_padded(values))
        if key.group == "weighted_bag":
            assert jagged.weights is not None
            weights.append(_padded(jagged.weights))
    numbers = np.zeros((rows + PADDING_ROWS, schema.num_dense), np.float32)
    for column, of_column in zip(schema.dense_columns, dense, strict=True):
        numbers[:rows, column.start : column.start + column.width] = of_column.reshape(rows, column.width)
    return GraphInputs(ids, lengths, weights, numbers, _padded(codes))


def _one_per_row(jagged: Jagged, rows: int) -> Integers:
    """Ids of a single-valued key with 0 where there is none."""
    if jagged.offsets is None:
        return jagged.values
    values = np.zeros(rows, np.int64)
    values[np.diff(jagged.offsets) > 0] = jagged.values
    return values


def _padded(values: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([values, np.zeros((PADDING_ROWS, *values.shape[1:]), values.dtype)])


def input_names(schema: Schema) -> list[str]:
    """Names of the arrays of ``GraphInputs``, flat: what the inputs of the ONNX graph are called."""
    keys = schema.sparse_keys
    weights = [f"weights.{key.name}" for key in keys if key.group == "weighted_bag"]
    return [*(f"ids.{key.name}" for key in keys), "lengths", *weights, "dense", "codes"]


def flat(inputs: GraphInputs) -> list[NDArray[Any]]:
    """The arrays in the order of ``input_names``."""
    return [*inputs.ids, inputs.lengths, *inputs.weights, inputs.dense, inputs.codes]
