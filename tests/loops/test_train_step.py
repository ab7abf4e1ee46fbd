from __future__ import annotations

import pytest
import torch
from lightning.fabric import Fabric

from mlenv.batch import Batch, Position, SparseFeatures
from mlenv.config import LOSSES, EmbeddingsConfig, ObjectiveConfig
from mlenv.kinds import class_of
from mlenv.loops.fit import Progress
from mlenv.loops.optimizers import build_table_optimizers, dense_parameters, options_of_tables
from mlenv.loops.ranks import Shares
from mlenv.loops.train_step import EagerStep
from mlenv.modules import MLPConfig, Objective, RankerConfig, TorchEmbeddings
from mlenv.schema import Categorical, Label, Schema, Table

SCHEMA = Schema(
    features={"item": Categorical()}, tables={"item": Table(num_embeddings=5, embedding_dim=4)}, labels={"a": Label(), "b": Label()}
)
IDS = torch.tensor([0, 1, 1, 3, 2, 1, 0])
LABELS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
WEIGHTS = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.5, 3.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.5]])
"""Of task b, nothing counts in the first rows."""
POINTWISE = sorted(kind for kind in LOSSES if not class_of(kind, LOSSES, "loss").reads_requests)


def batch_of(start, stop):
    lengths = torch.ones(stop - start, dtype=torch.int32)
    sparse = SparseFeatures(("item",), IDS[start:stop], lengths, (stop - start,))
    return Batch(sparse, torch.zeros(stop - start, 0), LABELS[start:stop], WEIGHTS[start:stop], position=Position(row=stop))


def trained(batches, num_batches, loss="binary_cross_entropy", table_optimizer="row_wise_adagrad"):
    """Tensors after two passes, and the outputs of the steps."""
    torch.manual_seed(0)
    config = EmbeddingsConfig(learning_rate=0.3, init_std=0.5, optimizer=table_optimizer)
    ranker = RankerConfig(crossing=None, deep=MLPConfig(hidden=(8,)), heads=MLPConfig(hidden=()))
    model = ranker.build(SCHEMA, TorchEmbeddings(SCHEMA, config, seed=0))
    losses = {task: class_of(loss, LOSSES, "loss")() for task in SCHEMA.tasks}
    objective = Objective(ObjectiveConfig(losses=losses, task_weights={"b": 0.5}), SCHEMA.tasks, model)
    optimizers = [torch.optim.SGD(dense_parameters(model), lr=0.5), *build_table_optimizers(options_of_tables(model, config))]
    clip, shares = (dense_parameters(model), 0.2), Shares(rows=(0,), batch_size=1)
    step = EagerStep(
        Fabric(accelerator="cpu", devices=1), model, optimizers, objective, clip, None, shares, batch_of(0, 0), None, num_batches
    )
    source = iter(batches * 2)
    outputs = []
    while (output := step.advance(source, Progress())) is not None:
        outputs.append(output)
    return model.state_dict(), outputs


@pytest.mark.parametrize("table_optimizer", ["row_wise_adagrad", "sgd", "adam"])
@pytest.mark.parametrize("loss", POINTWISE)
def test_several_batches_in_one_step_are_one_large_batch(loss, table_optimizer):
    whole, expected = trained([batch_of(0, 7)], 1, loss, table_optimizer)
    parts, outputs = trained([batch_of(0, 3), batch_of(3, 5), batch_of(5, 7)], 3, loss, table_optimizer)
    assert len(expected) == len(outputs) == 2
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    for one, other in zip(expected, outputs, strict=True):
        assert (one.num_examples, one.position) == (other.num_examples, other.position)
        torch.testing.assert_close(other.losses, one.losses)
        torch.testing.assert_close(other.weights, one.weights)


def test_batches_that_weigh_differently_do_not_count_alike():
    whole, _ = trained([batch_of(0, 7)], 1)
    single, outputs = trained([batch_of(0, 3), batch_of(3, 5), batch_of(5, 7)], 1)
    assert len(outputs) == 6
    assert any(not torch.allclose(whole[name], single[name], atol=1e-3) for name in whole)


def test_the_last_step_takes_what_is_left():
    _, outputs = trained([batch_of(0, 3), batch_of(3, 5), batch_of(5, 7)], 4)
    assert [(output.num_examples, output.position.row) for output in outputs] == [(10, 3), (4, 7)]
    assert outputs[0].weights.tolist() == (WEIGHTS.sum(0) + WEIGHTS[:3].sum(0)).tolist()
    assert outputs[1].weights.tolist() == WEIGHTS[3:].sum(0).tolist()
