from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mlenv.config import EmbeddingsConfig, TableConfig
from mlenv.errors import ConfigError
from mlenv.loops.dense_optimizers import AdamWConfig
from mlenv.loops.optimizers import build_table_optimizers, dense_parameters, options_of_tables, plain_tables
from mlenv.modules import TorchEmbeddings
from mlenv.schema import Categorical, Label, Schema, Table


def test_row_wise_adagrad_by_hand():
    table = nn.Embedding(4, 2, sparse=True)
    before = table.weight.detach().clone()
    (optimizer,) = build_table_optimizers([(table.weight, EmbeddingsConfig(learning_rate=0.5, eps=0.25))])
    weights = torch.tensor([[3.0, 4.0]])
    for _ in range(2):
        (table(torch.tensor([1, 1, 2])) * weights).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    # Row 1 occurs twice, so its gradient is (6, 8) and the mean of its squares 50; row 2 has half the gradient.
    row_1 = before[1] - 0.5 * torch.tensor([6.0, 8.0]) * (1 / (math.sqrt(50) + 0.25) + 1 / (math.sqrt(100) + 0.25))
    row_2 = before[2] - 0.5 * torch.tensor([3.0, 4.0]) * (1 / (math.sqrt(12.5) + 0.25) + 1 / (math.sqrt(25) + 0.25))
    torch.testing.assert_close(table.weight.detach()[1:3], torch.stack([row_1, row_2]))
    assert torch.equal(table.weight.detach()[[0, 3]], before[[0, 3]])
    assert optimizer.state[table.weight]["sum"].tolist() == [0, 100, 25, 0]


def test_weight_decay_pulls_only_the_rows_that_are_looked_up():
    table = nn.Embedding(3, 1, sparse=True)
    with torch.no_grad():
        table.weight.fill_(2.0)
    (optimizer,) = build_table_optimizers([(table.weight, EmbeddingsConfig(learning_rate=0.1, eps=0.0, weight_decay=0.5))])
    (table(torch.tensor([0])) * 3).sum().backward()
    optimizer.step()
    gradient = 3 + 0.5 * 2
    assert table.weight[:, 0].tolist() == [pytest.approx(2 - 0.1 * gradient / abs(gradient)), 2, 2]


def test_adam_has_all_its_state_from_the_start():
    model = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 2))
    dense = dense_parameters(model)
    assert [id(parameter) for parameter in dense] == [id(model[1].weight), id(model[1].bias)]
    assert [id(table) for table in plain_tables(model)] == [id(model[0].weight)]
    adam = AdamWConfig(learning_rate=0.1, weight_decay=0.3).build(dense)
    reference = torch.optim.AdamW(
        [
            {"params": [copy := nn.Parameter(model[1].weight.detach().clone())], "weight_decay": 0.3},
            {"params": [bias := nn.Parameter(model[1].bias.detach().clone())]},
        ],
        lr=0.1,
        weight_decay=0.0,
    )
    assert all(set(adam.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"} for parameter in dense)
    for _ in range(3):
        for parameter in (model[1].weight, model[1].bias, copy, bias):
            parameter.grad = parameter.detach() * 0.5 + 1
        adam.step()
        reference.step()
    torch.testing.assert_close(model[1].weight, copy)
    torch.testing.assert_close(model[1].bias, bias)


def test_adam_over_whole_tables_descends_the_loss_plus_half_the_penalty():
    config = EmbeddingsConfig(optimizer="adam", learning_rate=0.1, weight_decay=0.3, init_std=1.0)
    schema = Schema(features={"item": Categorical()}, tables={"item": Table(num_embeddings=4, embedding_dim=2)}, labels={"click": Label()})
    model = nn.Sequential(TorchEmbeddings(schema, config, seed=0), nn.Embedding(3, 2))
    tables = plain_tables(model)
    assert [id(table) for table in tables] == [id(model[0].tables["item"].weight)]
    assert [id(parameter) for parameter in dense_parameters(model)] == [id(model[1].weight)]
    (optimizer,) = build_table_optimizers(options_of_tables(model, config))
    assert set(optimizer.state[tables[0]]) == {"step", "exp_avg", "exp_avg_sq"}

    # Kingma and Ba, algorithm 1, with the gradient of the penalised loss by autograd.
    table = tables[0].detach().double().requires_grad_()
    first, second = torch.zeros(4, 2), torch.zeros(4, 2)
    factors = torch.tensor([[1.0, -2.0]])
    ids = torch.tensor([1, 1, 3])
    for step in range(1, 4):
        (nn.functional.embedding(ids, tables[0]) * factors).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = (nn.functional.embedding(ids, table) * factors).square().sum() + 0.3 / 2 * table.square().sum()
        (gradient,) = torch.autograd.grad(loss, table)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        with torch.no_grad():
            table -= 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + config.eps)
    torch.testing.assert_close(tables[0].double(), table, rtol=1e-5, atol=1e-6)


def three_tables(**options):
    schema = Schema(
        features={name: Categorical() for name in ("item", "user", "place")},
        tables={name: Table(num_embeddings=4, embedding_dim=2) for name in ("item", "user", "place")},
        labels={"click": Label()},
    )
    config = EmbeddingsConfig(learning_rate=0.5, init_std=1.0, **options)
    return TorchEmbeddings(schema, config, seed=0), config


def test_every_table_has_its_own_optimizer():
    own = {"user": TableConfig(optimizer="sgd", learning_rate=0.25), "place": TableConfig(learning_rate=0.125, weight_decay=0.5)}
    embeddings, config = three_tables(eps=0.0, tables=own)
    before = {name: table.weight.detach().clone() for name, table in embeddings.tables.items()}
    optimizers = build_table_optimizers(options_of_tables(embeddings, config))
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["RowWiseAdagrad", "SGD"]
    factor = torch.tensor([[3.0, -1.0]])
    for table in embeddings.tables.values():
        (nn.functional.embedding(torch.tensor([2, 2]), table.weight, sparse=table.sparse) * factor).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    gradient = {"item": 2 * factor[0], "user": 2 * factor[0], "place": 2 * factor[0] + 0.5 * before["place"][2]}
    steps = {name: gradient[name] / gradient[name].square().mean().sqrt() for name in ("item", "place")} | {"user": gradient["user"]}
    for name, rate in {"item": 0.5, "user": 0.25, "place": 0.125}.items():
        expected = before[name].clone()
        expected[2] -= rate * steps[name]
        torch.testing.assert_close(embeddings.tables[name].weight.detach(), expected)


def test_a_table_under_adam_has_dense_gradients_beside_others_that_have_not():
    embeddings, config = three_tables(tables={"user": TableConfig(optimizer="adam", learning_rate=0.1)})
    assert {name: table.sparse for name, table in embeddings.tables.items()} == {"item": True, "user": False, "place": True}
    _, adam = build_table_optimizers(options_of_tables(embeddings, config))
    assert [id(table) for table in adam.state] == [id(embeddings.tables["user"].weight)]
    assert adam.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tables": {"user": TableConfig(optimizer="sgd")}}, r"tables\.user\.learning_rate: expected a number, because sgd takes another"),
        ({"optimizer": "sgd", "weight_decay": 0.1}, "weight_decay: expected 0 under sgd"),
        (
            {"weight_decay": 0.1, "tables": {"user": TableConfig(optimizer="sgd", learning_rate=1.0)}},
            r"tables\.user\.weight_decay: expected 0 under sgd",
        ),
        ({"optimizer": "sgd", "tables": {"user": TableConfig(eps=0.1)}}, r"tables\.user\.eps: expected null"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EmbeddingsConfig(**options)
