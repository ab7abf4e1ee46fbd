from __future__ import annotations

from decimal import Decimal, localcontext

import polars as pl
import pytest
import torch
from torch import nn

from mlenv import compose, train
from mlenv.errors import ConfigError
from mlenv.modules.entire_space_heads import EntireSpaceHeads

TASKS = ("refund", "click", "like", "conversion")
GIVEN = {"refund": "conversion", "conversion": "click"}


def heads(tasks=TASKS, given=GIVEN) -> EntireSpaceHeads:
    """Over heads that pass their inputs on: those are the conditional logits themselves."""
    return EntireSpaceHeads(nn.Identity(), tasks, given)


@pytest.mark.parametrize("batch", [1, 50])
def test_the_probabilities_multiply_along_the_chain(batch):
    conditional = 3 * torch.randn(batch, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    refund, click, like, conversion = conditional.sigmoid().unbind(1)
    expected = torch.stack([click * conversion * refund, click, like, click * conversion], dim=1)
    torch.testing.assert_close(heads()(conditional).sigmoid(), expected, atol=1e-12, rtol=0)


def test_gradients():
    conditional = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(heads(), conditional)


def exact_logit(*factors: float) -> float:
    """Of the product of the sigmoids, with all its digits."""
    with localcontext(prec=300):
        probability = Decimal(1)
        for logit in factors:
            probability /= 1 + Decimal(-logit).exp()
        return float((probability / (1 - probability)).ln())


@pytest.mark.parametrize("size", [40, 200])
def test_extreme_logits_keep_their_digits(size):
    pairs = [(float(a), float(b)) for a in (-size, 0, size) for b in (-size, 0, size)]
    conditional = torch.tensor(pairs, requires_grad=True)
    logits = heads(("click", "conversion"), {"conversion": "click"})(conditional)[:, 1]
    torch.testing.assert_close(logits.double(), torch.tensor([exact_logit(*pair) for pair in pairs]).double(), rtol=1e-6, atol=1e-6)
    logits.sum().backward()
    assert ((conditional.grad >= 0) & (conditional.grad <= 1 + 1e-3)).all()


def test_the_largest_logits_still_have_finite_gradients():
    conditional = torch.tensor([[a, b] for a in (-1e30, 0.0, 1e30) for b in (-1e30, 0.0, 1e30)], requires_grad=True)
    logits = heads(("click", "conversion"), {"conversion": "click"})(conditional)
    nn.functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)).backward()
    assert logits.isfinite().all()
    assert conditional.grad.isfinite().all()


def test_reduced_precision_does_not_reach_it():
    conditional = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    exact = heads()(conditional)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(heads()(conditional), exact)


def test_export_and_compile():
    module = heads()
    exported = torch.export.export(module, (torch.randn(4, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    inputs = torch.randn(9, 4)
    torch.testing.assert_close(exported(inputs), module(inputs))
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(inputs), module(inputs))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"convresion": "click"}, r"^entire_space: .*Received: 'convresion'.*did you mean 'conversion'"),
        ({"conversion": "clik"}, r"^entire_space.conversion: .*Received: 'clik'.*did you mean 'click'"),
        ({"click": "click"}, r"^entire_space: .*click after click"),
        ({"conversion": "click", "click": "conversion"}, r"^entire_space: .* after .* after "),
    ],
)
def test_tasks_that_are_not_there_and_circles_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        heads(given=given)


def test_a_ranker_learns_conversions_over_all_impressions(demo_arguments, tmp_path):
    overrides = ["model.entire_space.conversion=click", "schema.labels.conversion.mask=''", "loop.max_steps=3"]
    file, *arguments = demo_arguments(*overrides)
    assert train(compose(file, arguments)).steps == 3
    rows = pl.read_parquet(tmp_path / "run of a test" / "predictions")
    assert (rows["prediction_conversion"] < rows["prediction_click"]).all()
    assert (rows["weight_conversion"] == 1).all()


def test_a_conversion_that_is_masked_by_the_click_is_refused(demo_arguments):
    file, *arguments = demo_arguments("model.entire_space.conversion=click", "loop.max_steps=3")
    with pytest.raises(ConfigError, match=r"^model.entire_space.conversion: .*Fix: set schema.labels.conversion.mask"):
        train(compose(file, arguments))
