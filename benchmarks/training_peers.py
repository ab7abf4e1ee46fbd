"""Other libraries' training steps on the rows of the same file, held in memory as each library takes them, without its loader.

``python -m benchmarks.training_peers LIBRARY MODEL PRECISION FILE NUM_EMBEDDINGS`` trains as many steps as each line of its input
says. Every library runs its own model and the body of its own training loop, with Adam, which is what it takes by default.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from benchmarks.criteo_shaped import EMBEDDING_DIM, NUM_CATEGORICAL, NUM_NUMERIC
from benchmarks.crossing_peers import library
from benchmarks.training_turns import serve

BATCH_SIZE, BATCHES = 4096, 16
CATEGORICAL = [f"C{number}" for number in range(NUM_CATEGORICAL)]
NUMERIC = [f"I{number}" for number in range(NUM_NUMERIC)]
HIDDEN = {"deepfm": (64, 32), "dcn_v2": (500, 500, 500)}

Columns = dict[str, Tensor]
"""``(batch,)`` by column: int64 ids, float32 numbers and labels."""
Step = Callable[[Any], None]


def fuxictr(model: str, num_embeddings: int) -> tuple[Step, Callable[[Columns], Any]]:
    """FuxiCTR's layers put together as its model_zoo does, which its wheel leaves out, in its ``BaseModel.train_step``."""
    layers, base = library("fuxictr.pytorch.layers"), library("fuxictr.pytorch.models").BaseModel
    features = library("fuxictr.features").FeatureMap("bench", "")
    for name in CATEGORICAL:
        features.features[name] = {"type": "categorical", "source": "", "vocab_size": num_embeddings}
    for name in NUMERIC:
        # One column for each number beside the vectors of the ids: the input of the cross net is as wide as that of the others.
        features.features[name] = {"type": "numeric", "source": ""} | ({"embedding_dim": 1} if model == "dcn_v2" else {})
    features.labels, features.num_fields, features.default_emb_dim = ["click"], len(features.features), EMBEDDING_DIM
    options = {"task": "binary_classification", "verbose": 0, "metrics": ["AUC"], "model_root": ""}

    class Model(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(features, gpu=-1, **options)
            self.embedding_layer = layers.FeatureEmbedding(features, EMBEDDING_DIM)
            width = NUM_CATEGORICAL * EMBEDDING_DIM + NUM_NUMERIC * (1 if model == "dcn_v2" else EMBEDDING_DIM)
            deep = {"input_dim": width, "hidden_units": list(HIDDEN[model]), "hidden_activations": "ReLU"}
            if model == "deepfm":
                self.fm, self.mlp = layers.FactorizationMachine(features), layers.MLP_Block(output_dim=1, **deep)
            else:
                self.crossnet, self.mlp = layers.CrossNetV2(width, 3), layers.MLP_Block(output_dim=None, **deep)
                self.fc = nn.Linear(width + HIDDEN[model][-1], 1)
            self.compile("adam", "binary_crossentropy", lr=1e-3)
            self.reset_parameters()
            self._max_gradient_norm = 10.0

        def forward(self, inputs: Columns) -> dict[str, Tensor]:
            ids = self.get_inputs(inputs)
            if model == "deepfm":
                vectors = self.embedding_layer(ids)
                logits = self.fm(ids, vectors) + self.mlp(vectors.flatten(start_dim=1))
            else:
                vectors = self.embedding_layer(ids, flatten_emb=True)
                logits = self.fc(torch.cat([self.crossnet(vectors), self.mlp(vectors)], dim=-1))
            return {"y_pred": self.output_activation(logits)}

    made = Model()
    made.train()
    return lambda batch: _read(made.train_step(batch)), lambda columns: columns


def torch_rechub(model: str, num_embeddings: int) -> tuple[Step, Callable[[Columns], Any]]:
    """Torch-RecHub's models in the body of its ``CTRTrainer.train_one_epoch``. Its machine multiplies the 26 fields of ids only."""
    features, ranking = library("torch_rechub.basic.features"), library("torch_rechub.models.ranking")
    sparse = [features.SparseFeature(name, num_embeddings, EMBEDDING_DIM) for name in CATEGORICAL]
    dense = [features.DenseFeature(name) for name in NUMERIC]
    deep = {"dims": list(HIDDEN[model]), "dropout": 0.0, "activation": "relu"}
    if model == "deepfm":
        made = ranking.DeepFM(sparse + dense, sparse, deep)
    else:
        made = library("torch_rechub.models.ranking.dcn_v2").DCNv2(sparse + dense, 3, deep, use_low_rank_mixture=False)
    trainer = library("torch_rechub.trainers").CTRTrainer(made, optimizer_params={"lr": 1e-3}, device="cpu")
    silent = library("torch_rechub.trainers.ctr_trainer")
    silent.tqdm = SimpleNamespace(tqdm=lambda batches, **_: _Quiet(batches))
    return lambda batch: _ignore(trainer.train_one_epoch([batch])), lambda columns: (
        {name: column for name, column in columns.items() if name != "click"},
        columns["click"],
    )


def deepctr_torch(model: str, num_embeddings: int) -> tuple[Step, Callable[[Columns], Any]]:
    """DeepCTR-Torch's models, and the body of its ``fit``, without its penalties. Its machine multiplies the 26 fields of ids only."""
    inputs, models = library("deepctr_torch.inputs"), {"deepfm": ("deepfm", "DeepFM"), "dcn_v2": ("dcn", "DCN")}
    columns = [inputs.SparseFeat(name, num_embeddings, embedding_dim=EMBEDDING_DIM) for name in CATEGORICAL]
    columns += [inputs.DenseFeat(name, 1) for name in NUMERIC]
    file, name = models[model]
    options = {"dnn_hidden_units": HIDDEN[model], "l2_reg_linear": 0, "l2_reg_embedding": 0, "device": "cpu"}
    if model == "dcn_v2":
        options |= {"cross_num": 3, "cross_parameterization": "matrix", "l2_reg_cross": 0}
    made = getattr(library(f"deepctr_torch.models.{file}"), name)(columns, columns, **options)
    made.compile("adam", "binary_crossentropy")
    made.train()

    def step(batch: tuple[Tensor, Tensor]) -> None:
        rows, labels = batch
        predictions = made(rows.float()).squeeze(1)
        made.optim.zero_grad()
        loss = made.loss_func(predictions, labels, reduction="sum")
        total = loss + made.get_regularization_loss() + made.aux_loss
        _read(loss)
        _read(total)
        total.backward()
        made.optim.step()

    return step, lambda columns: (torch.stack([columns[name].double() for name in (*CATEGORICAL, *NUMERIC)], dim=1), columns["click"])


LIBRARIES = {"FuxiCTR": fuxictr, "Torch-RecHub": torch_rechub, "DeepCTR-Torch": deepctr_torch}


def main(name: str, model: str, file: Path, num_embeddings: int) -> None:
    torch.manual_seed(0)
    step, prepare = LIBRARIES[name](model, num_embeddings)
    batches = [prepare(columns) for columns in read_columns(file)]

    def train(steps: int) -> int:
        for batch in islice(cycle(batches), steps):
            step(batch)
        return steps * BATCH_SIZE

    serve(train)


def read_columns(file: Path) -> list[Columns]:
    """The first rows of a file, batch by batch."""
    rows = next(pq.ParquetFile(file).iter_batches(BATCH_SIZE * BATCHES))
    columns = {name: torch.from_numpy(rows.column(name).to_numpy().copy()) for name in (*CATEGORICAL, *NUMERIC)}
    columns["click"] = torch.from_numpy(rows.column("click").to_numpy().astype(np.float32))
    return [
        {name: column[start : start + BATCH_SIZE] for name, column in columns.items()}
        for start in range(0, BATCH_SIZE * BATCHES, BATCH_SIZE)
    ]


class _Quiet(list[Any]):
    """A progress bar that shows nothing."""

    def set_postfix(self, **_: object) -> None: ...


def _read(loss: Tensor) -> None:
    """Every library reads its loss at every step."""
    loss.item()


def _ignore(_: object) -> None: ...


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
