from __future__ import annotations

from itertools import combinations

import pytest
import torch

from mlenv.errors import ConfigError
from mlenv.modules.dot_interaction import DotInteractionConfig


@pytest.mark.parametrize("field_dims", [(3, 3, 3, 3), (3, 1, 2, 1)])
def test_gives_the_dot_product_of_every_pair_in_order(field_dims):
    torch.manual_seed(0)
    dots = DotInteractionConfig(token_dim=3).build(field_dims).double()
    inputs = torch.randn(5, sum(field_dims), dtype=torch.float64)
    expected = [torch.stack([first @ second for first, second in combinations(tokens, 2)]) for tokens in dots.tokens(inputs)]
    torch.testing.assert_close(dots(inputs), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert dots.output_dim == 6
    assert set(field_dims) != {dots.tokens.token_dim} or dots.state_dict() == {}


def test_by_hand():
    dots = DotInteractionConfig(token_dim=2).build((2, 2, 2))
    assert dots(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])).tolist() == [[11, 17, 39]]


def test_bad_values_are_refused():
    with pytest.raises(ConfigError, match=r"^token_dim: "):
        DotInteractionConfig(token_dim=0)
