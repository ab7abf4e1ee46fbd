"""What a search draws and stops, without trainings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mlenv.config.tuning import Asha, Choice, Integers, LogUniform, Median, TuningConfig, Uniform
from mlenv.studies.search import Search

pytest.importorskip("optuna")

CROSSINGS = ({"kind": "cross_net", "num_layers": 2}, {"kind": "masknet"})
CONFIG = TuningConfig(
    config="ranker.yaml",
    output="search",
    metric="click/normalized_entropy",
    num_trials=20,
    random_trials=4,
    space={
        "rate": LogUniform(low=1e-4, high=1e-1),
        "dropout": Uniform(low=0.0, high=0.5),
        "layers": Integers(low=2, high=8, step=3),
        "crossing": Choice(values=CROSSINGS),
    },
    early_stopping=None,
)


def loss(values):
    return abs(math.log10(values["rate"]) + 2) + (values["crossing"] != CROSSINGS[1])


def drawn(search, numbers):
    found = []
    for number in numbers:
        found.append(search.begin(number))
        search.end(number, "finished", loss(found[-1]))
    return found


def test_values_lie_in_their_space():
    found = drawn(Search(replace(CONFIG, search="random")), range(1, 41))
    assert all(1e-4 <= values["rate"] <= 1e-1 and 0 <= values["dropout"] <= 0.5 for values in found)
    assert {values["layers"] for values in found} == {2, 5, 8}
    assert [values["crossing"] in CROSSINGS for values in found] == [True] * 40
    below = sum(values["rate"] < math.sqrt(1e-4 * 1e-1) for values in found)
    assert 10 <= below <= 30  # as many below the middle of the logarithms as above


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_a_search_that_goes_on_draws_what_it_would_have_drawn(kind):
    config = replace(CONFIG, search=kind)
    whole = drawn(Search(config), range(1, 9))
    again = Search(config)
    for number, values in enumerate(whole[:5], start=1):
        assert again.begin(number, values) == values
        again.end(number, "finished", loss(values))
    assert drawn(again, range(6, 9)) == whole[5:]
    assert drawn(Search(replace(config, seed=1)), [1]) != whole[:1]


def test_tpe_looks_where_it_was_good():
    late = {kind: drawn(Search(replace(CONFIG, search=kind)), range(1, 41))[20:] for kind in ("random", "tpe")}
    means = {kind: sum(map(loss, found)) / len(found) for kind, found in late.items()}
    assert means["tpe"] < 0.6 * means["random"]


def told(rule, curves):
    """Tells a search of trials one after another; gives the evaluation that each was stopped at, 0 for none."""
    search, stops = Search(replace(CONFIG, early_stopping=rule)), []
    for number, curve in enumerate(curves, start=1):
        search.begin(number)
        stop = next((place for place, value in enumerate(curve, start=1) if search.must_stop(number, place, value)), 0)
        search.end(number, "stopped" if stop else "finished", None if stop else min(curve))
        stops.append(stop)
    return stops


def test_asha_keeps_the_best_of_each_rung():
    good, bad, late = [0.5, 0.4, 0.3, 0.2], [0.9, 0.8, 0.7, 0.6], [0.45, 0.44, 0.43, 0.42]
    # Rungs at 1, 2 and 4 evaluations; the better half goes on. late is best at 1, and second of two at 2.
    assert told(Asha(reduction_factor=2), [good, bad, late]) == [0, 1, 2]
    assert told(Asha(reduction_factor=2, grace_evaluations=2), [good, bad]) == [0, 2]


def test_median_stops_the_worse_half():
    curves = [[level, level - 0.1, level - 0.2] for level in (0.5, 0.6, 0.7)]
    assert told(Median(grace_trials=3, grace_evaluations=2), [*curves, [0.9, 0.8, 0.7], [0.4, 0.3, 0.2]]) == [0, 0, 0, 2, 0]
    assert told(None, [*curves, [0.9, 0.8, 0.7]]) == [0, 0, 0, 0]


def test_a_trial_that_goes_on_is_not_judged_twice():
    search = Search(replace(CONFIG, early_stopping=Asha(reduction_factor=2)))
    search.begin(1)
    search.end(1, "failed", None)
    values = search.begin(2)
    assert not search.must_stop(2, 1, 0.5)
    again = Search(replace(CONFIG, early_stopping=Asha(reduction_factor=2)))
    again.begin(1)
    again.end(1, "failed", None)
    assert again.begin(2, values, [0.5]) == values
    assert not again.must_stop(2, 1, 0.5)
    assert not again.must_stop(2, 2, 0.4)
