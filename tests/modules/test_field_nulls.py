from __future__ import annotations

import pytest
import torch

from mlenv.modules import FieldNulls

DIMS = (2, 1, 3)


@pytest.fixture
def nulls():
    module = FieldNulls(DIMS)
    assert module.values.tolist() == [0] * 6
    with torch.no_grad():
        module.values.copy_(torch.arange(10.0, 16.0))
    return module


def inputs(rows=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 6, dtype=dtype, generator=generator), torch.rand(rows, 3, generator=generator) < 0.5


@pytest.mark.parametrize("rows", [1, 4])
def test_null_fields_are_replaced(nulls, rows):
    fields, is_null = inputs(rows)
    result = nulls(fields, is_null)
    for row in range(rows):
        for place, piece in enumerate(result[row].split(list(DIMS))):
            source = nulls.values if is_null[row, place] else fields[row]
            assert torch.equal(piece, source.split(list(DIMS))[place])


def test_what_a_null_field_holds_does_not_matter(nulls):
    fields = torch.full((2, 6), torch.nan, requires_grad=True)
    result = nulls(fields, torch.ones(2, 3, dtype=torch.bool))
    assert result.tolist() == [nulls.values.tolist()] * 2
    result.sum().backward()
    assert nulls.values.grad.tolist() == [2] * 6
    assert fields.grad.tolist() == [[0] * 6] * 2


def test_gradients(nulls):
    fields, is_null = inputs(dtype=torch.float64)
    nulls = nulls.double()
    function = lambda f, v: torch.func.functional_call(nulls, {"values": v}, (f, is_null))  # noqa: E731
    assert torch.autograd.gradcheck(function, (fields.requires_grad_(), nulls.values))


def test_it_compiles_and_exports(nulls):
    fields, is_null = inputs()
    expected = nulls(fields, is_null)
    torch.testing.assert_close(torch.compile(nulls, fullgraph=True, backend="aot_eager")(fields, is_null), expected)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(nulls, (fields, is_null), dynamic_shapes=({0: batch}, {0: batch}), strict=True).module()
    torch.testing.assert_close(exported(fields[:1], is_null[:1]), expected[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nulls(fields.bfloat16(), is_null).isfinite().all()


def test_no_fields():
    assert FieldNulls(())(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)
