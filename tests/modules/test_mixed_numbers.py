from __future__ import annotations

import math

import pytest
import torch

from mlenv import compose, train
from mlenv.errors import ConfigError
from mlenv.modules import MixedNumbersConfig
from mlenv.schema import Binary, DenseVector, Label, Numeric, Schema

SCHEMA = Schema(
    features={
        "vector": DenseVector(dim=2),
        "price": Numeric(default=None),
        "flag": Binary(),
        "age": Numeric(log1p=True, default=None),
    },
    labels={"click": Label()},
)
"""Columns: two of the vector, price, flag, age."""


@pytest.fixture
def module():
    mixed = MixedNumbersConfig(clip=4.0).build(SCHEMA)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mixed.scores.copy_(torch.randn(3, 2, generator=generator))
        mixed.normalization.mean.copy_(torch.tensor([0.0, 0.0, 3.0, 0.0, 0.5]))
        mixed.normalization.std.copy_(torch.tensor([1.0, 1.0, 2.0, 1.0, 0.25]))
    return mixed


def inputs(rows=6, dtype=torch.float64):
    dense = 6 * torch.randn(rows, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))
    dense[:, 3] = torch.arange(rows) % 2
    return dense


def slowly(module, dense):
    """One number at a time."""

    def clip(value):
        return max(-4.0, min(4.0, value))

    weights = module.scores.exp() / module.scores.exp().sum(0)
    result = [[clip(value) for value in row] for row in dense.tolist()]
    for row, values in enumerate(dense.tolist()):
        for place, (column, is_log1p) in enumerate([(2, False), (4, True)]):
            mean = module.normalization.mean[column].item()
            x = values[column]
            if math.isnan(x):
                x = math.expm1(mean) if is_log1p else mean
            log = math.copysign(math.log(1 + abs(x)), x)
            standardized = ((log if is_log1p else x) - module.normalization.mean[column]) / module.normalization.std[column]
            forms = clip(x), clip(log), clip(standardized.item())
            result[row][column] = sum(weight * form for weight, form in zip(weights[:, place].tolist(), forms, strict=True))
    return torch.tensor(result, dtype=dense.dtype)


@pytest.mark.parametrize("rows", [1, 6])
def test_it_is_the_mix_of_three_forms(module, rows):
    dense = inputs(rows)
    dense[-1, 2] = dense[0, 4] = math.nan
    torch.testing.assert_close(module.double()(dense), slowly(module.double(), dense), atol=1e-6, rtol=0)


def test_shares_start_equal():
    mixed = MixedNumbersConfig().build(SCHEMA)
    e = math.e - 1
    torch.testing.assert_close(mixed(torch.tensor([[7.0, 8.0, e, 1.0, e]])), torch.tensor([[7, 8, (2 * e + 1) / 3, 1, (e + 2) / 3]]))


def test_statistics_are_fitted_in_the_shared_normalization(module):
    module.normalization.fit([torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0, 0.0], [0.0, 0.0, math.nan, 0.0, 0.0]])])
    assert (module.normalization.mean[2], module.normalization.std[2]) == (3, 2)
    assert {"scores", "normalization.mean", "normalization.std"} == set(module.state_dict())


def test_gradients(module):
    dense = inputs(2).clamp(-3, 3).requires_grad_()
    module = module.double()
    assert torch.autograd.gradcheck(lambda d, s: torch.func.functional_call(module, {"scores": s}, d), (dense, module.scores))


@pytest.mark.parametrize("size", [1e30, -1e30, 3e38, math.nan])
def test_huge_numbers_and_nulls_stay_finite(module, size):
    dense = torch.full((3, 5), size)
    if math.isnan(size):  # only numbers may be null
        dense[:, [0, 1, 3]] = 0
    result = module(dense)
    assert result.abs().max() <= 4
    result.sum().backward()
    assert module.scores.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(dense).isfinite().all()


def test_it_compiles_and_exports(module):
    dense = inputs(dtype=torch.float32)
    dense[0, 2] = math.nan
    expected = module(dense)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(dense), expected)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(module, (dense,), dynamic_shapes=shapes, strict=True).module()
    torch.testing.assert_close(exported(dense[:1]), expected[:1])


def test_a_clip_that_cuts_flags_is_refused():
    with pytest.raises(ConfigError, match=r"^clip: "):
        MixedNumbersConfig(clip=0.9)


def test_a_ranker_trains_with_it(demo_arguments):
    file, *overrides = demo_arguments("loop.max_steps=3", "model.numbers={kind: mixed, clip: 8}", "schema.features.price.default=null")
    assert train(compose(file, overrides)).steps == 3
