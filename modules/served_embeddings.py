"""Embedding tables as a served graph holds them: small if wished, looked up in a way that every exporter takes."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlenv.batch import SparseFeatures
from mlenv.modules.embeddings import (
    EmbeddedFeatures,
    EmbeddedSequence,
    EmbeddingLayout,
    TorchEmbeddings,
    joined_fields,
    pool,
    side_by_side,
)

TableType = Literal["float32", "bfloat16", "int8"]
TABLE_TYPES: tuple[TableType, ...] = get_args(TableType)


class ServedEmbeddings(nn.Module):
    """Gives what ``TorchEmbeddings`` gives, for features whose single-valued keys hold exactly one id per example.

    Where such an id is missing, anything stands in for it and its length is 0. So no shape hangs on what the ids are, and the
    one forward pass that is traced is right for all.

    Args:
        trained: the tables, as they were trained.
        table_type: how a row is stored; it is float32 again once it is looked up.
    """

    def __init__(self, trained: TorchEmbeddings, table_type: TableType = "float32") -> None:
        super().__init__()
        self.layout: EmbeddingLayout = trained.layout
        table_class = {"float32": StoredTable, "bfloat16": StoredTable, "int8": QuantizedTable}[table_type]
        dtype = torch.bfloat16 if table_type == "bfloat16" else torch.float32
        self.tables = nn.ModuleDict()
        for name, table in trained.tables.items():
            assert isinstance(table, nn.Embedding)
            self.tables[name] = table_class(table.weight.detach().to(dtype))

    def forward(self, sparse: SparseFeatures) -> EmbeddedFeatures:
        """
        Args:
            sparse: the keys of the schema, in its order.

        Returns:
            float32 vectors; an empty bag is zeros.
        """
        lengths = sparse.lengths.view(len(sparse.keys), -1)
        counts = list(sparse.value_counts)
        weights = [None] * len(counts) if sparse.weights is None else torch.split(sparse.weights, counts)
        pooled: list[Tensor] = []
        events: dict[str, list[EmbeddedSequence]] = {}
        for place, (key, ids) in enumerate(zip(self.layout.keys, torch.split(sparse.values, counts), strict=True)):
            vectors = self.tables[key.table](ids)
            if key.group == "sequence":
                events.setdefault(key.feature, []).append(EmbeddedSequence(vectors, lengths[place]))
            elif key.group == "single":
                pooled.append(vectors * (lengths[place] > 0).unsqueeze(1))
            else:
                of_ids = weights[place] if key.group == "weighted_bag" else None
                pooled.append(pool(vectors, lengths[place], of_ids, self.layout.tables[key.table].pooling))
        return EmbeddedFeatures(side_by_side(pooled, lengths), joined_fields(events))


class StoredTable(nn.Module):
    """Rows as they are."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        """``(ids,)`` int64 to ``(ids, dim)`` float32."""
        return functional.embedding(ids, self.weight).float()


class QuantizedTable(nn.Module):
    """Rows of 8-bit integers, each with a scale and an offset of its own: ``row = scale * integers + offset``.

    The integers run from the smallest to the largest element of the row, so that no element is off by more than half a
    scale, which is a 510th of the row's range.

    Source: Guan et al., "Post-training 4-bit quantization on embedding tables", 2019, arXiv:1911.02079, section 2 (range-based
    asymmetric row-wise quantization).
    """

    integers: Tensor
    scales: Tensor
    offsets: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        lowest, highest = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scales = (highest - lowest) / 255
        steps = (weight - lowest) / torch.where(scales > 0, scales, 1.0)
        self.register_buffer("integers", steps.round().clamp(0, 255).to(torch.uint8))
        self.register_buffer("scales", scales)
        self.register_buffer("offsets", lowest)

    def forward(self, ids: Tensor) -> Tensor:
        """``(ids,)`` int64 to ``(ids, dim)`` float32."""
        scales, offsets = functional.embedding(ids, self.scales), functional.embedding(ids, self.offsets)
        return self.integers.index_select(0, ids).float() * scales + offsets
