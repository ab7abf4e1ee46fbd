"""What crossings need, and all of them in one model."""

from __future__ import annotations

import json

import pytest

from mlenv import compose, train
from mlenv.composition import to_plain
from mlenv.errors import ConfigError
from mlenv.kinds import class_of
from mlenv.modules.crossings import CROSSINGS

PAIRWISE = ("autoint", "dot", "fm", "transformer")


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
