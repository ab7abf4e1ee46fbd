from __future__ import annotations

import pytest
import torch

from mlenv import compose, train
from mlenv.composition import to_plain
from mlenv.errors import ConfigError, Problems
from mlenv.modules.cross_net import CrossNetConfig
from mlenv.modules.crossing_stack import CrossingEnsembleConfig, CrossingStackConfig
from mlenv.modules.dot_interaction import DotInteractionConfig
from mlenv.modules.masknet import MaskNetConfig

CROSSINGS = (MaskNetConfig(block_dim=5), CrossNetConfig(num_layers=1))
FIELD_DIMS = (2, 3)


def test_a_stack_is_one_after_the_other():
    stack = CrossingStackConfig(crossings=CROSSINGS).build(FIELD_DIMS)
    inputs = torch.randn(4, 5)
    masks, crosses = stack.crossings
    assert torch.equal(stack(inputs), crosses(masks(inputs)))
    assert stack.output_dim == 5


def test_an_ensemble_is_side_by_side():
    ensemble = CrossingEnsembleConfig(crossings=(*CROSSINGS, DotInteractionConfig())).build(FIELD_DIMS)
    inputs = torch.randn(4, 5)
    assert torch.equal(ensemble(inputs), torch.cat([crossing(inputs) for crossing in ensemble.crossings], dim=1))
    assert ensemble.output_dim == 5 + 5 + 1


def test_what_stands_at_a_wrong_place_is_named():
    inner = CrossingStackConfig(crossings=(*CROSSINGS, DotInteractionConfig()))
    with pytest.raises(ConfigError, match=r"^crossings\[0\]\.crossings\[2\]\.kind: expected two fields or more for 'dot'"):
        CrossingEnsembleConfig(crossings=(inner,)).build(FIELD_DIMS)


@pytest.mark.parametrize("config", [CrossingStackConfig, CrossingEnsembleConfig])
def test_no_crossings_are_refused(config):
    with pytest.raises(ConfigError, match=r"^crossings: expected one crossing or more"):
        config(crossings=())


def test_a_model_with_stacks_in_an_ensemble_trains(demo_arguments):
    stack = "{kind: stack, crossings: [{kind: masknet, structure: parallel, num_blocks: 2}, {kind: cross_net, num_layers: 1}]}"
    crossing = f"model.crossing={{kind: ensemble, crossings: [{stack}, {{kind: transformer, num_layers: 1}}]}}"
    file, *overrides = demo_arguments(crossing, "loop.max_steps=3", "data.test=null")
    config = compose(file, overrides)
    plain = to_plain(config)["model"]["crossing"]
    assert [entry["kind"] for entry in plain["crossings"]] == ["stack", "transformer"]
    assert [entry["kind"] for entry in plain["crossings"][0]["crossings"]] == ["masknet", "cross_net"]
    assert train(config).steps == 3


def test_a_bad_value_deep_inside_is_refused_with_its_key(demo_arguments):
    crossing = "model.crossing={kind: stack, crossings: [{kind: cross_net}, {kind: transformer, token_dim: 10, num_heads: 4}]}"
    file, *overrides = demo_arguments(crossing)
    with pytest.raises(Problems, match=r"model\.crossing\.crossings\[1\]\.num_heads: expected a divisor of token_dim = 10"):
        compose(file, overrides)
