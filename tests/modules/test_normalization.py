from __future__ import annotations

import math

import pytest
import torch

from mlenv.errors import ConfigError
from mlenv.modules import NumericNormalization, NumericNormalizationConfig
from mlenv.schema import Binary, DenseVector, Label, Numeric, Schema

NAN = math.nan
NULLABLE = Schema(
    features={"plain": Numeric(default=None), "heavy": Numeric(default=None, log1p=True), "flag": Binary()}, labels={"click": Label()}
)


def test_normalization_is_fitted_and_travels_in_the_state():
    schema = Schema(
        features={"plain": Numeric(), "heavy": Numeric(log1p=True), "flag": Binary(), "same": Numeric(), "vector": DenseVector(dim=1)},
        labels={"click": Label()},
    )
    dense = torch.tensor([[1.0, 0.0, 1.0, 7.0, 5.0], [3.0, math.e - 1, 0.0, 7.0, 6.0], [5.0, -(math.e**2 - 1), 1.0, 7.0, 7.0]])
    normalization = NumericNormalization(schema)
    normalization.fit([dense[:1], dense[1:]])
    std = math.sqrt(8 / 3)
    heavy = torch.tensor([0.0, 1.0, -2.0])
    result = normalization(dense)
    torch.testing.assert_close(result[:, 0], torch.tensor([-2 / std, 0.0, 2 / std]))
    torch.testing.assert_close(result[:, 1], (heavy - heavy.mean()) / heavy.std(correction=0))
    assert torch.equal(result[:, [2, 4]], dense[:, [2, 4]])
    assert result[:, 3].tolist() == [0, 0, 0]
    assert normalization(torch.tensor([[1e9, 1e9, 1.0, 1e9, 1e9]]))[0].tolist() == [10, pytest.approx(10), 1, 10, 10]
    again = NumericNormalization(schema)
    again.load_state_dict(normalization.state_dict())
    assert torch.equal(again(dense), result)


def test_nulls_do_not_count_and_become_the_mean():
    values = [[1.0, NAN, 1.0], [NAN, math.e - 1, 0.0], [4.0, NAN, 1.0], [4.0, -(math.e - 1), 0.0]]
    normalization = NumericNormalizationConfig().build(NULLABLE)
    normalization.fit([torch.tensor(values[:3]), torch.tensor(values[3:])])
    std = math.sqrt(2)  # of 1, 4, 4
    expected = torch.tensor([[-2 / std, 0, 1], [0, 1, 0], [1 / std, 0, 1], [1 / std, -1, 0]])
    torch.testing.assert_close(normalization(torch.tensor(values)), expected)
    torch.testing.assert_close(normalization(torch.tensor(values[1:2])), expected[1:2])


def test_a_column_of_nulls_keeps_its_scale():
    normalization = NumericNormalization(NULLABLE)
    normalization.fit([torch.full((4, 3), NAN).index_fill(1, torch.tensor([2]), 1.0)])
    assert (normalization.mean.tolist(), normalization.std.tolist()) == ([0, 0, 0], [1, 1, 1])
    assert normalization(torch.tensor([[NAN, NAN, 1.0], [3.0, 0.0, 0.0]])).tolist() == [[0, 0, 1], [3, 0, 0]]


@pytest.mark.parametrize("size", [1e30, 3e38])
def test_huge_numbers_are_cut(size):
    schema = Schema(features={"plain": Numeric(), "heavy": Numeric(log1p=True), "vector": DenseVector(dim=2)}, labels={"click": Label()})
    dense = torch.tensor([[size, size, size, -size], [-size, -size, 0.5, -9.0]], requires_grad=True)
    result = NumericNormalizationConfig(clip=20).build(schema)(dense)
    assert result[0].tolist() == result[0].clamp(-20, 20).tolist()
    assert result[1, 2:].tolist() == [0.5, -9.0]
    result.sum().backward()
    assert dense.grad.isfinite().all()
    fitted = NumericNormalization(schema)
    fitted.fit([dense.detach()])
    assert fitted(dense).isfinite().all()


def test_gradients():
    normalization = NumericNormalization(NULLABLE).double()
    normalization.mean.add_(0.3)
    dense = torch.tensor([[0.5, -2.0, 1.0], [1.5, 3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalization, dense)


def test_it_compiles_and_exports():
    normalization, dense = NumericNormalization(NULLABLE), torch.tensor([[1.0, NAN, 1.0], [NAN, 2.0, 0.0], [1e30, -1e30, 0.0]])
    expected = normalization(dense)
    assert expected.isfinite().all()
    torch.testing.assert_close(torch.compile(normalization, fullgraph=True, backend="aot_eager")(dense), expected)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(normalization, (dense,), dynamic_shapes=shapes, strict=True).module()
    torch.testing.assert_close(exported(dense[:1]), expected[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert normalization(dense).isfinite().all()


@pytest.mark.parametrize("clip", [0.5, math.inf, NAN])
def test_a_clip_that_cuts_flags_is_refused(clip):
    with pytest.raises(ConfigError, match=r"^clip: "):
        NumericNormalizationConfig(clip=clip)
