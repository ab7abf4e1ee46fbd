"""What every part that a config can name promises, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mlenv.kinds import class_of, kind_of
from mlenv.modules.cross_net import CrossNetConfig
from mlenv.modules.crossings import CROSSINGS
from mlenv.modules.dot_interaction import DotInteractionConfig
from mlenv.modules.embeddings import EmbeddedSequence
from mlenv.modules.field_tokens import FieldTokens
from mlenv.modules.heads import TaskHeads
from mlenv.modules.masknet import MaskNetConfig
from mlenv.modules.mlp import MLPConfig
from mlenv.modules.normalization import NumericNormalization
from mlenv.modules.ranker import EXPERTS
from mlenv.modules.representation import SEQUENCES
from mlenv.schema import Binary, Label, Numeric, Schema

FIELD_DIMS = (3, 3, 1, 2)
TASKS = ("click", "buy")
LENGTHS = (4, 0, 1, 2, 3)
EVENT_DIM, CANDIDATE_DIM = 4, 2
BATCH_SIZE = len(LENGTHS)


class Flat(nn.Module):
    """Tensors in, one tensor out: what a module gives per task side by side, and a sequence put together from its parts."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        if len(inputs) == 3:
            values, lengths, candidate = inputs
            return self.module(EmbeddedSequence(values, lengths), candidate)
        outputs = self.module(*inputs)
        return torch.stack(outputs, dim=1) if isinstance(outputs, tuple) else outputs


class SameForAllTasks(nn.Module):
    """Heads over one representation."""

    def __init__(self, heads: nn.Module) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, inputs: Tensor) -> Tensor:
        return self.heads((inputs,) * len(TASKS))


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    input_dim: int = 0
    """Width of the inputs; 0 stands for a sequence and its candidate."""

    def module(self, dtype: torch.dtype = torch.float32) -> Flat:
        torch.manual_seed(0)
        return Flat(self.build()).to(dtype)

    def inputs(self, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        if self.input_dim:
            return (torch.randn(BATCH_SIZE, self.input_dim, dtype=dtype, generator=generator)[rows],)
        values = torch.randn(sum(LENGTHS), EVENT_DIM, dtype=dtype, generator=generator)
        candidates = torch.randn(BATCH_SIZE, CANDIDATE_DIM, dtype=dtype, generator=generator)
        chosen = torch.cat(values.split(LENGTHS)[rows])
        return chosen, torch.tensor(LENGTHS, dtype=torch.int32)[rows], candidates[rows]


SMALL = {
    "crossing": {
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
    },
    "experts": {
        "mmoe": {"num_experts": 3, "expert": MLPConfig(hidden=(4, 3), normalization="layer")},
        "ple": {"expert": MLPConfig(hidden=(4,))},
        "shared_bottom": {},
    },
    "sequence": {
        "din": {"candidate": ("item",), "hidden": (5,)},
        "hstu": {"num_heads": 2, "head_dim": 2, "max_length": 3, "dropout": 0.0},
        "mean": {},
        "trans_act": {"candidate": ("item",), "num_heads": 2, "feed_forward_dim": 5, "num_layers": 1, "num_last": 3, "dropout": 0.0},
    },
}
"""A small config of each kind of each table."""
VARIANTS = [
    ("crossing", "fm", {"output": "vector"}),
    ("crossing", "masknet", {"structure": "parallel"}),
    ("sequence", "din", {"normalize": True}),
    ("sequence", "trans_act", {"num_last": 0}),
]
TABLES = {"crossing": CROSSINGS, "experts": EXPERTS, "sequence": SEQUENCES}
ARGUMENTS = {"crossing": (FIELD_DIMS,), "experts": (sum(FIELD_DIMS), TASKS), "sequence": (EVENT_DIM, CANDIDATE_DIM)}
NUMBERS = Schema(features={"plain": Numeric(), "heavy": Numeric(log1p=True), "flag": Binary()}, labels={"click": Label()})


def small_config(table: str, kind: str, options: dict[str, object]) -> object:
    return class_of(kind, TABLES[table], table)(**{**SMALL[table][kind], **options})


def case_of(table: str, kind: str, options: dict[str, object]) -> Case:
    config = small_config(table, kind, options)
    name = "-".join([table, kind, *map(str, options.values())])
    return Case(name, lambda: config.build(*ARGUMENTS[table]), 0 if table == "sequence" else sum(FIELD_DIMS))


CASES = [case_of(table, kind, {}) for table, kinds in SMALL.items() for kind in kinds] + [case_of(*variant) for variant in VARIANTS]
CASES += [Case(f"mlp-{norm}", lambda norm=norm: MLPConfig(hidden=(4, 3), normalization=norm).build(5), 5) for norm in ("none", "layer")]
CASES += [
    Case("mlp-batch", lambda: MLPConfig(hidden=(4,), normalization="batch").build(5).eval(), 5),
    Case("heads", lambda: SameForAllTasks(TaskHeads(MLPConfig(hidden=(3,)), 5, TASKS)), 5),
    Case("field_tokens", lambda: FieldTokens(FIELD_DIMS, 3), sum(FIELD_DIMS)),
    Case("field_tokens-view", lambda: FieldTokens((3, 3), 3), 6),
    Case("normalization", lambda: NumericNormalization(NUMBERS), 3),
]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
EVERY_SEQUENCE = pytest.mark.parametrize("case", [case for case in CASES if not case.input_dim], ids=lambda case: case.name)


@pytest.mark.parametrize("table", TABLES)
def test_the_tables_are_sorted_and_every_kind_is_tested(table):
    assert list(TABLES[table]) == sorted(TABLES[table]) == list(SMALL[table])
    for kind in TABLES[table]:
        assert kind_of(small_config(table, kind, {}), TABLES[table]) == kind


@EVERY_CASE
def test_an_example_does_not_depend_on_its_batch_and_one_is_enough(case):
    module = case.module()
    outputs = module(*case.inputs())
    assert outputs.dtype == torch.float32
    if hasattr(module.module, "output_dim"):
        assert outputs.shape[-1] == module.module.output_dim
    for place in range(BATCH_SIZE):
        torch.testing.assert_close(module(*case.inputs(slice(place, place + 1))), outputs[place : place + 1])
    assert module(*(torch.zeros_like(tensor) for tensor in case.inputs(slice(1, 2)))).isfinite().all()


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "heads"], ids=lambda case: case.name)  # heads give float32
def test_gradients(case):
    inputs = [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in case.inputs(dtype=torch.float64)]
    assert torch.autograd.gradcheck(case.module(torch.float64), inputs)


@EVERY_CASE
def test_every_weight_learns(case):
    module = case.module()
    inputs = case.inputs()
    inputs[0].requires_grad_()  # where there is no weight
    outputs = module(*inputs)
    (outputs * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    # A softmax over scores takes no notice of their common bias.
    assert all(weight.grad is not None and (weight.grad.any() or weight.ndim == 1) for weight in module.parameters())


@EVERY_CASE
@pytest.mark.parametrize("scale", [1, 1e3])
def test_half_precision_stays_finite_and_close(case, scale):
    module = case.module()
    inputs = [(scale * tensor).requires_grad_() if tensor.is_floating_point() else tensor for tensor in case.inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = module(*inputs)
    assert outputs.isfinite().all()
    if scale == 1:
        torch.testing.assert_close(outputs.float(), module(*inputs), rtol=0.1, atol=0.1)
    outputs.float().sum().backward()
    gradients = [tensor.grad for tensor in (*inputs, *module.parameters()) if tensor.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@EVERY_CASE
def test_exports_with_any_batch_size(case):
    module, inputs = case.module().eval(), case.inputs()
    batch, events = torch.export.Dim("batch", min=2), torch.export.Dim("events")
    shapes = {"inputs": ({0: batch},) if case.input_dim else ({0: events}, {0: batch}, {0: batch})}
    exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=True).module()
    for rows in (slice(0, 3), slice(2, 5)):
        torch.testing.assert_close(exported(*case.inputs(rows)), module(*case.inputs(rows)))


@EVERY_CASE
def test_compiles_without_a_break_and_trains(case):
    module, inputs = case.module(), case.inputs()
    inputs[0].requires_grad_()
    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):  # the length of the longest sequence is a value
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        outputs = compiled(*inputs)
    expected = module(*inputs)
    torch.testing.assert_close(outputs, expected)
    (gradient,), (expected_gradient,) = torch.autograd.grad(outputs.sum(), inputs[:1]), torch.autograd.grad(expected.sum(), inputs[:1])
    torch.testing.assert_close(gradient, expected_gradient)


@EVERY_SEQUENCE
def test_a_batch_without_events_is_zeros_and_trains(case):
    module = case.module()
    values = torch.zeros(0, EVENT_DIM, requires_grad=True)
    outputs = module(values, torch.zeros(2, dtype=torch.int32), torch.randn(2, CANDIDATE_DIM))
    assert not outputs.any()
    outputs.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in module.parameters())
