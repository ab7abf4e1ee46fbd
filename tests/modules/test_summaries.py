from __future__ import annotations

import pytest
import torch

from mlenv import compose, train
from mlenv.errors import ConfigError, MlenvError
from mlenv.modules import MLPConfig, Summaries, SummaryConfig

FEATURES, DIMS = ("a", "b", "c", "d"), (2, 1, 3, 2)
USER = SummaryConfig(features=("c", "a"), mlp=MLPConfig(hidden=(5, 3)))
ITEM = SummaryConfig(features=("d", "a"), mlp=MLPConfig(hidden=(4,), normalization="layer"))


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Summaries({"user": USER, "items": ITEM}, FEATURES, DIMS)  # a is in both groups; nn.Module has a method named items


def inputs(rows=4, dtype=torch.float32):
    return torch.randn(rows, sum(DIMS), dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [1, 4])
def test_groups_become_one_field_each(module, rows):
    module, values = module.double(), inputs(rows, torch.float64)
    result = module(values)
    assert module.field_dims == (1, 3, 4)
    for row, (a0, a1, b, c0, c1, c2, d0, d1) in enumerate(values):
        user, item = torch.stack([c0, c1, c2, a0, a1]), torch.stack([d0, d1, a0, a1])
        for layer in (module.mlps[0].layers[0], module.mlps[0].layers[2]):
            user = torch.relu(layer.weight @ user + layer.bias)
        linear = module.mlps[1].layers[0]
        item = linear.weight @ item + linear.bias
        item = torch.relu((item - item.mean()) / (item.var(correction=0) + 1e-5).sqrt())
        torch.testing.assert_close(result[row], torch.cat([b[None], user, item]), atol=1e-6, rtol=0)


def test_all_features_in_one_group():
    summaries = Summaries({"all": SummaryConfig(features=FEATURES, mlp=MLPConfig(hidden=(6,)))}, FEATURES, DIMS)
    assert summaries.field_dims == (6,)
    torch.testing.assert_close(summaries(inputs()), summaries.mlps[0](inputs()))


def test_gradients(module):
    assert torch.autograd.gradcheck(module.double(), inputs(2, torch.float64).requires_grad_())


def test_zeros_train(module):
    module(torch.zeros(3, sum(DIMS))).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_it_compiles_and_exports(module):
    expected = module(inputs())
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(inputs()), expected)
    exported = torch.export.export(module, (inputs(),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True).module()
    torch.testing.assert_close(exported(inputs()[:1]), expected[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(inputs() * 1e3).isfinite().all()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"features": ()}, "features"),
        ({"features": ("a", "a")}, "features"),
        ({"features": ("a",), "mlp": MLPConfig(hidden=())}, "mlp.hidden"),
    ],
)
def test_options_that_cannot_work_are_refused(options, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        SummaryConfig(**options)


def test_a_ranker_trains_with_it(demo_arguments):
    users, items = "{features: [user_id, user_country, history, price]}", "{features: [item_id, item_vector, price], mlp: {hidden: [16]}}"
    file, *overrides = demo_arguments("loop.max_steps=3", f"model.summaries={{user: {users}, item: {items}}}")
    assert train(compose(file, overrides)).steps == 3
    file, *overrides = demo_arguments("model.summaries={item: {features: [item_idd]}}", output="another")
    with pytest.raises(MlenvError, match=r"model\.summaries\.item\.features: .*'item_idd'.*did you mean 'item_id'"):
        train(compose(file, overrides))
