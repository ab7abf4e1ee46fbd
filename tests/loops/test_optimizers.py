from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mlenv.config import EmbeddingsConfig, OptimizerConfig
from mlenv.loops.optimizers import RowWiseAdagrad, build_adam, build_table_optimizer, dense_parameters, plain_tables
from mlenv.modules import TorchEmbeddings
from mlenv.schema import Categorical, Label, Schema, Table


def test_row_wise_adagrad_by_hand():
    table = nn.Embedding(4, 2, sparse=True)
    before = table.weight.detach().clone()
    optimizer = RowWiseAdagrad([table.weight], EmbeddingsConfig(learning_rate=0.5, eps=0.25))
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
    optimizer = RowWiseAdagrad([table.weight], EmbeddingsConfig(learning_rate=0.1, eps=0.0, weight_decay=0.5))
    (table(torch.tensor([0])) * 3).sum().backward()
    optimizer.step()
    gradient = 3 + 0.5 * 2
    assert table.weight[:, 0].tolist() == [pytest.approx(2 - 0.1 * gradient / abs(gradient)), 2, 2]


def test_adam_has_all_its_state_from_the_start():
    model = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 2))
    dense = dense_parameters(model)
    assert [id(parameter) for parameter in dense] == [id(model[1].weight), id(model[1].bias)]
    assert [id(table) for table in plain_tables(model)] == [id(model[0].weight)]
    adam = build_adam(dense, OptimizerConfig(learning_rate=0.1, weight_decay=0.3))
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
    optimizer = build_table_optimizer(tables, config)
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
