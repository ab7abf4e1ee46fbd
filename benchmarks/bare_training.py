"""The limit: a loop written by hand for one model, over tensors that are in memory already, with fbgemm's fused tables.

``python -m benchmarks.bare_training MODEL PRECISION FILE NUM_EMBEDDINGS`` trains as many steps as each line of its input says.
"""

from __future__ import annotations

import sys
from itertools import cycle, islice
from pathlib import Path

import fbgemm_gpu  # noqa: F401
import numpy as np
import pyarrow.parquet as pq
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.criteo_shaped import EMBEDDING_DIM, NUM_CATEGORICAL, NUM_NUMERIC
from benchmarks.training_turns import serve

BATCH_SIZE, BATCHES = 4096, 16
WIDTH = NUM_CATEGORICAL * EMBEDDING_DIM + NUM_NUMERIC


class DeepFM(nn.Module):
    """Products of all pairs of fields beside a deep network; a number is a field through a vector of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fields = nn.Parameter(torch.randn(NUM_NUMERIC, EMBEDDING_DIM))
        self.biases = nn.Parameter(torch.zeros(NUM_NUMERIC, EMBEDDING_DIM))
        self.first_order = nn.Linear(WIDTH, 1, bias=False)
        self.deep = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(33, 1)

    def forward(self, vectors: Tensor, numbers: Tensor) -> Tensor:
        fields = torch.cat([vectors.view(-1, NUM_CATEGORICAL, EMBEDDING_DIM), numbers.unsqueeze(2) * self.fields + self.biases], dim=1)
        inputs = torch.cat([vectors, numbers], dim=1)
        pairs = 0.5 * (fields.sum(1).square() - (fields * fields).sum(1)).sum(1, keepdim=True)
        return self.head(torch.cat([self.first_order(inputs) + pairs, self.deep(inputs)], dim=1))


class DCNv2(nn.Module):
    """Three crosses of full rank beside 500-500-500."""

    def __init__(self) -> None:
        super().__init__()
        self.crosses = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.deep = nn.Sequential(nn.Linear(WIDTH, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU())
        self.head = nn.Linear(WIDTH + 500, 1)

    def forward(self, vectors: Tensor, numbers: Tensor) -> Tensor:
        inputs = torch.cat([vectors, numbers], dim=1)
        crossed = inputs
        for layer in self.crosses:
            crossed = inputs * layer(crossed) + crossed
        return self.head(torch.cat([crossed, self.deep(inputs)], dim=1))


MODELS = {"deepfm": DeepFM, "dcn_v2": DCNv2}


def main(model_name: str, precision: str, file: Path, num_embeddings: int) -> None:
    torch.manual_seed(0)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(num_embeddings, EMBEDDING_DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)] * NUM_CATEGORICAL,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.02,
        eps=1e-8,
        pooling_mode=PoolingMode.SUM,
    )
    tables.init_embedding_weights_uniform(-0.01, 0.01)
    model = MODELS[model_name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches, offsets = read_batches(file), torch.arange(NUM_CATEGORICAL * BATCH_SIZE + 1)

    def train(steps: int) -> int:
        for ids, numbers, labels in islice(cycle(batches), steps):
            vectors = tables(ids, offsets)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                logits = model(vectors, numbers)
            functional.binary_cross_entropy_with_logits(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return steps * BATCH_SIZE

    serve(train)


def read_batches(file: Path) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Ids with all of a column together, ``(columns * batch,)``; numbers ``(batch, columns)``; labels ``(batch, 1)``."""
    rows = next(pq.ParquetFile(file).iter_batches(BATCH_SIZE * BATCHES))
    ids = np.stack([rows.column(f"C{number}").to_numpy() for number in range(NUM_CATEGORICAL)])
    numbers = np.stack([rows.column(f"I{number}").to_numpy() for number in range(NUM_NUMERIC)], axis=1)
    labels = rows.column("click").to_numpy().astype(np.float32)[:, None]
    cuts = [slice(start, start + BATCH_SIZE) for start in range(0, BATCH_SIZE * BATCHES, BATCH_SIZE)]
    return [
        (torch.from_numpy(ids[:, cut].ravel()), torch.from_numpy(numbers[cut].copy()), torch.from_numpy(labels[cut].copy())) for cut in cuts
    ]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
