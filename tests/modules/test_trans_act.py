"""TransAct against PyTorch's own encoder, run example by example."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlenv.composition import compose
from mlenv.errors import ConfigError
from mlenv.modules.embeddings import EmbeddedSequence
from mlenv.modules.trans_act import TransAct, TransActConfig
from mlenv.training import train

LENGTHS = torch.tensor([4, 0, 1, 2], dtype=torch.int32)
EVENT_DIM, CANDIDATE_DIM, NUM_LAST = 4, 2, 3
TOKEN_DIM = EVENT_DIM + CANDIDATE_DIM


def build(**options: object) -> TransAct:
    torch.manual_seed(0)
    defaults = {"candidate": ("item",), "num_heads": 2, "feed_forward_dim": 5, "num_last": NUM_LAST, "dropout": 0.0}
    return TransActConfig(**{**defaults, **options}).build(EVENT_DIM, CANDIDATE_DIM)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(int(LENGTHS.sum()), EVENT_DIM, dtype=dtype, generator=generator)
    return values, torch.randn(len(LENGTHS), CANDIDATE_DIM, dtype=dtype, generator=generator)


def pytorch_layer(layer: nn.Module) -> nn.TransformerEncoderLayer:
    """PyTorch's layer with the same parameters."""
    heads, hidden = layer.num_heads, layer.feed_forward[0].out_features
    other = nn.TransformerEncoderLayer(TOKEN_DIM, heads, hidden, dropout=0.0, batch_first=True).double()
    state = {
        "self_attn.in_proj_weight": layer.queries_keys_values.weight,
        "self_attn.in_proj_bias": layer.queries_keys_values.bias,
    }
    parts = {"self_attn.out_proj": layer.attended, "linear1": layer.feed_forward[0], "linear2": layer.feed_forward[3]}
    for name, part in {**parts, "norm1": layer.norms[0], "norm2": layer.norms[1]}.items():
        state |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
    other.load_state_dict(state)
    return other


def slowly(encoder: TransAct, values: torch.Tensor, candidates: torch.Tensor, num_hidden: list[int]) -> torch.Tensor:
    layers = [pytorch_layer(layer) for layer in encoder.layers]
    results = []
    for events, candidate, hidden in zip(values.split(LENGTHS.tolist()), candidates, num_hidden, strict=True):
        seen = events[: max(0, len(events) - hidden)]
        slots, highest = torch.zeros(NUM_LAST, TOKEN_DIM, dtype=values.dtype), torch.zeros(TOKEN_DIM, dtype=values.dtype)
        if len(seen):
            tokens = torch.stack([torch.cat([event, candidate]) for event in seen]).unsqueeze(0)
            for layer in layers:
                tokens = layer(tokens)
            tokens = tokens[0]
            highest = tokens.max(0).values
            for place, token in enumerate(tokens):
                if (slot := NUM_LAST - len(events) + place) >= 0:
                    slots[slot] = token
        results.append(torch.cat([slots.flatten(), highest]))
    return torch.stack(results)


def test_it_equals_pytorchs_encoder_on_each_example():
    encoder, (values, candidate) = build().double(), inputs()
    encoded = encoder(EmbeddedSequence(values, LENGTHS), candidate)
    torch.testing.assert_close(encoded, slowly(encoder, values, candidate, [0] * 4), rtol=1e-6, atol=1e-9)
    assert encoded.shape == (4, encoder.output_dim)
    assert not encoded[1].any()
    one = encoder(EmbeddedSequence(values[4:5], LENGTHS[2:3]), candidate[2:3])
    torch.testing.assert_close(one, encoded[2:3])


def test_training_hides_the_latest_events_of_each_example():
    encoder, (values, candidate) = build(max_hidden_events=2).double(), inputs()
    drawn = set()
    for seed in range(5):
        torch.manual_seed(seed)
        num_hidden = torch.randint(3, (4, 1)).flatten().tolist()
        torch.manual_seed(seed)
        encoded = encoder(EmbeddedSequence(values, LENGTHS), candidate)
        torch.testing.assert_close(encoded, slowly(encoder, values, candidate, num_hidden), rtol=1e-6, atol=1e-9)
        drawn |= set(num_hidden)
    assert drawn == {0, 1, 2}
    encoder.eval()
    state = torch.get_rng_state()
    encoded = encoder(EmbeddedSequence(values, LENGTHS), candidate)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(encoded, slowly(encoder, values, candidate, [0] * 4))


def test_no_event_of_another_example_is_seen():
    encoder, (values, candidate) = build().double(), inputs()
    values.requires_grad_()
    encoder(EmbeddedSequence(values, LENGTHS), candidate)[0].sum().backward()
    assert values.grad[:4].any(1).all()
    assert not values.grad[4:].any()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"candidate": ()}, "candidate"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 4}, "num_heads"),
        ({"feed_forward_dim": 0}, "feed_forward_dim"),
        ({"num_last": -1}, "num_last"),
        ({"max_hidden_events": -1}, "max_hidden_events"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_options_that_cannot_work_are_refused(options, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        build(**options)


def test_a_ranker_trains_with_it(demo_arguments):
    sequence = "model.sequences.history={kind: trans_act, candidate: [item_id], num_last: 3, max_hidden_events: 2}"
    file, *overrides = demo_arguments("loop.max_steps=3", sequence)
    assert train(compose(file, overrides)).steps == 3
