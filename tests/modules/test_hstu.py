"""HSTU against a loop over examples, heads and pairs of events."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mlenv.composition import compose
from mlenv.errors import ConfigError
from mlenv.modules.embeddings import EmbeddedSequence
from mlenv.modules.hstu import HSTU, HSTUConfig
from mlenv.training import train

LENGTHS = torch.tensor([4, 0, 1, 2], dtype=torch.int32)
EVENT_DIM, MAX_LENGTH = 3, 3
NO_CANDIDATE = torch.zeros(4, 0)


def build(**options: object) -> HSTU:
    torch.manual_seed(0)
    defaults = {"num_heads": 2, "head_dim": 2, "max_length": MAX_LENGTH, "dropout": 0.0}
    return HSTUConfig(**{**defaults, **options}).build(EVENT_DIM, 0)


def events_of_all(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(int(LENGTHS.sum()), EVENT_DIM, dtype=dtype, generator=torch.Generator().manual_seed(1))


def slowly(encoder: HSTU, values: torch.Tensor) -> torch.Tensor:
    results = []
    for events in values.split(LENGTHS.tolist()):
        for layer in encoder.layers:
            size = layer.num_heads * 2
            gates, attended, queries, keys = functional.silu(layer.projection(layer.input_norm(events))).split(size, dim=1)
            rows = []
            for place in range(len(events)):
                mixed = torch.zeros(size, dtype=values.dtype)
                for earlier in range(place + 1):
                    bias = layer.distance_bias[min(place - earlier, MAX_LENGTH - 1)]
                    for head in range(layer.num_heads):
                        part = slice(2 * head, 2 * head + 2)
                        score = functional.silu(queries[place, part] @ keys[earlier, part] + bias) / MAX_LENGTH
                        mixed[part] = mixed[part] + score * attended[earlier, part]
                rows.append(events[place] + layer.output(layer.attention_norm(mixed) * gates[place]))
            events = torch.stack(rows) if rows else events
        results.append(events[-1] if len(events) else torch.zeros(EVENT_DIM, dtype=values.dtype))
    return torch.stack(results)


def test_it_equals_a_loop_over_pairs_of_events():
    encoder, values = build().double(), events_of_all()
    encoded = encoder(EmbeddedSequence(values, LENGTHS), NO_CANDIDATE)
    torch.testing.assert_close(encoded, slowly(encoder, values), rtol=1e-6, atol=1e-9)
    assert not encoded[1].any()
    one = encoder(EmbeddedSequence(values[4:5], LENGTHS[2:3]), NO_CANDIDATE[:1])
    torch.testing.assert_close(one, encoded[2:3])


def test_only_earlier_events_of_the_same_example_are_seen():
    encoder, values = build(num_layers=1).double(), events_of_all().requires_grad_()
    encoder(EmbeddedSequence(values, LENGTHS), NO_CANDIDATE)[0].sum().backward()
    assert values.grad[:4].any(1).all()
    assert not values.grad[4:].any()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"candidate": ("item",)}, "candidate"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_heads": 0}, "num_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"max_length": 0}, "max_length"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_options_that_cannot_work_are_refused(options, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        build(**options)


def test_a_ranker_trains_with_it(demo_arguments):
    file, *overrides = demo_arguments("loop.max_steps=3", "model.sequences.history={kind: hstu, head_dim: 8}")
    assert train(compose(file, overrides)).steps == 3
