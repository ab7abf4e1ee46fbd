"""DIN against a loop over examples and events."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlenv.composition import compose
from mlenv.errors import ConfigError
from mlenv.modules.embeddings import EmbeddedSequence
from mlenv.modules.target_attention import TargetAttention, TargetAttentionConfig
from mlenv.training import train

LENGTHS = torch.tensor([3, 0, 1, 2], dtype=torch.int32)
EVENT_DIM = 3


def build(candidate_dim: int = EVENT_DIM, *, normalize: bool = False) -> TargetAttention:
    torch.manual_seed(0)
    return TargetAttentionConfig(candidate=("item",), hidden=(5, 4), normalize=normalize).build(EVENT_DIM, candidate_dim)


def inputs(candidate_dim: int = EVENT_DIM, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(int(LENGTHS.sum()), EVENT_DIM, dtype=dtype, generator=generator)
    return values, torch.randn(len(LENGTHS), candidate_dim, dtype=dtype, generator=generator)


def slowly(attention: TargetAttention, values: torch.Tensor, lengths: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    results = []
    for events, candidate in zip(values.split(lengths.tolist()), attention.candidate(candidates), strict=True):
        weights = [attention.activation_unit(torch.cat([e, candidate, e - candidate, e * candidate])) for e in events]
        if attention.normalize and weights:
            weights = list(torch.cat(weights).softmax(0))
        results.append(sum((w * e for w, e in zip(weights, events, strict=True)), torch.zeros(EVENT_DIM, dtype=values.dtype)))
    return torch.stack(results)


@pytest.mark.parametrize("candidate_dim", [EVENT_DIM, 2])
@pytest.mark.parametrize("normalize", [False, True])
def test_it_equals_a_loop_over_events(candidate_dim, normalize):
    attention = build(candidate_dim, normalize=normalize).double()
    values, candidate = inputs(candidate_dim)
    pooled = attention(EmbeddedSequence(values, LENGTHS), candidate)
    torch.testing.assert_close(pooled, slowly(attention, values, LENGTHS, candidate), rtol=1e-6, atol=1e-9)
    assert pooled[1].tolist() == [0.0] * EVENT_DIM
    one = attention(EmbeddedSequence(values[:3], LENGTHS[:1]), candidate[:1])
    torch.testing.assert_close(one, pooled[:1])
    assert isinstance(attention.candidate, nn.Identity) == (candidate_dim == EVENT_DIM)


def test_weights_computed_by_hand():
    attention = TargetAttentionConfig(candidate=("item",), hidden=()).build(1, 1)
    with torch.no_grad():
        attention.activation_unit[1].weight.copy_(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
        attention.activation_unit[1].bias.fill_(0.5)
    pooled = attention(EmbeddedSequence(torch.tensor([[2.0], [3.0]]), torch.tensor([2])), torch.tensor([[5.0]]))
    first, second = 2 + 10 * 5 + 100 * (2 - 5) + 1000 * 10 + 0.5, 3 + 10 * 5 + 100 * (3 - 5) + 1000 * 15 + 0.5
    assert pooled.item() == pytest.approx(first * 2 + second * 3)


@pytest.mark.parametrize(("options", "key"), [({"candidate": ()}, "candidate"), ({"candidate": ("item",), "hidden": (8, 0)}, "hidden")])
def test_options_that_cannot_work_are_refused(options, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        TargetAttentionConfig(**options)


def test_a_ranker_trains_with_it(demo_arguments):
    file, *overrides = demo_arguments("loop.max_steps=3", "model.sequences.history={kind: din, candidate: [item_id, advertiser_id]}")
    assert train(compose(file, overrides)).steps == 3
