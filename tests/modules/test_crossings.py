"""What every crossing of the table promises, whatever it computes."""

from __future__ import annotations

import json

import pytest
import torch

from mlenv import compose, train
from mlenv.composition import to_plain
from mlenv.errors import ConfigError
from mlenv.kinds import class_of, kind_of
from mlenv.modules.cross_net import CrossNetConfig
from mlenv.modules.crossings import CROSSINGS
from mlenv.modules.dot_interaction import DotInteractionConfig
from mlenv.modules.masknet import MaskNetConfig
from mlenv.modules.mlp import MLPConfig

FIELD_DIMS = (3, 3, 1, 2)
SMALL = {
    "autoint": {"token_dim": 3, "attention_dim": 4, "num_layers": 2},
    "cross_net": {"num_layers": 2},
    "dot": {"token_dim": 3},
    "ensemble": {"crossings": (CrossNetConfig(num_layers=1), DotInteractionConfig(token_dim=2))},
    "final_mlp": {"gate": MLPConfig(hidden=(3,)), "first": MLPConfig(hidden=(4,)), "second": MLPConfig(hidden=(3, 2))},
    "fm": {"token_dim": 3},
    "gated_cross_net": {"num_layers": 2},
    "low_rank_cross_net": {"num_layers": 2, "num_experts": 2, "rank": 2},
    "masknet": {"num_blocks": 2, "block_dim": 4, "token_dim": 3},
    "stack": {"crossings": (MaskNetConfig(num_blocks=1, block_dim=3, token_dim=2), CrossNetConfig(num_layers=1))},
    "transformer": {"token_dim": 4, "feed_forward_dim": 5, "num_layers": 1},
}
"""A small config of each kind of the table."""
EVERY_KIND = pytest.mark.parametrize("kind", sorted(CROSSINGS))
PAIRWISE = ("autoint", "dot", "fm", "transformer")


def small(kind):
    torch.manual_seed(0)
    return class_of(kind, CROSSINGS, "crossing")(**SMALL[kind]).build(FIELD_DIMS)


def some_inputs(rows, **options):
    return torch.randn(rows, sum(FIELD_DIMS), generator=torch.Generator().manual_seed(1), **options)


def test_the_table_is_sorted_and_complete():
    assert list(CROSSINGS) == sorted(CROSSINGS) == list(SMALL)
    for kind in CROSSINGS:
        assert kind_of(class_of(kind, CROSSINGS, "crossing")(**SMALL[kind]), CROSSINGS) == kind


@EVERY_KIND
def test_rows_do_not_depend_on_each_other_and_one_is_enough(kind):
    module, inputs = small(kind), some_inputs(5)
    outputs = module(inputs)
    assert outputs.shape == (5, module.output_dim)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(module(inputs[2:3]), outputs[2:3])
    assert module(inputs[:0]).shape == (0, module.output_dim)
    assert module(torch.zeros(1, sum(FIELD_DIMS))).isfinite().all()


@EVERY_KIND
def test_gradients(kind):
    assert torch.autograd.gradcheck(small(kind).double(), some_inputs(2, dtype=torch.float64, requires_grad=True))


@EVERY_KIND
def test_every_weight_learns(kind):
    module = small(kind)
    module(some_inputs(16)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in module.parameters())


@EVERY_KIND
def test_autocast_stays_finite(kind):
    module, inputs = small(kind), some_inputs(4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = module(inputs)
    torch.testing.assert_close(outputs.float(), module(inputs), rtol=0.1, atol=0.1)
    outputs.float().sum().backward()
    assert inputs.grad.isfinite().all()


@EVERY_KIND
def test_exports_with_any_batch_size(kind):
    module, inputs = small(kind).eval(), some_inputs(4)
    program = torch.export.export(module, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(inputs[:3]), module(inputs[:3]))


@EVERY_KIND
def test_compiles_without_a_break(kind):
    module, inputs = small(kind), some_inputs(4)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs), module(inputs))


@pytest.mark.parametrize("kind", PAIRWISE)
def test_one_field_has_no_pairs(kind):
    with pytest.raises(ConfigError, match="kind: expected two fields or more"):
        class_of(kind, CROSSINGS, "crossing")().build((8,))


def test_a_model_with_every_crossing_side_by_side_trains(demo_arguments):
    kinds = [kind for kind in CROSSINGS if kind not in ("ensemble", "stack")]
    crossing = {"kind": "ensemble", "crossings": [{"kind": kind} for kind in kinds]}
    file, *overrides = demo_arguments(f"model.crossing={json.dumps(crossing)}", "loop.max_steps=3", "data.test=null")
    config = compose(file, overrides)
    assert [entry["kind"] for entry in to_plain(config)["model"]["crossing"]["crossings"]] == kinds
    assert train(config).steps == 3
