from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlenv.errors import ConfigError, DataError
from mlenv.offline.policy import LoggedRows, choices, evaluate_policy
from mlenv.offline.policy_log import PolicyColumns, read_log

DATA = Path(os.environ.get("MLENV_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def rows(rewards, propensities, targets, **more) -> LoggedRows:
    arrays = {name: np.asarray(values, np.float64) for name, values in more.items()}
    given = {"rewards": rewards, "propensities": propensities, "targets": targets}
    return LoggedRows(
        **{name: np.asarray(values, np.float64) for name, values in given.items()}, clusters=np.arange(len(rewards)), **arrays
    )


def test_estimates_by_hand():
    found = evaluate_policy(
        rows([1, 0, 1, 0], [0.5, 0.5, 0.25, 0.25], [1.0, 0.0, 0.5, 0.25], expected_shown=[0.5] * 4, expected_policy=[0.6] * 4)
    )
    weights = np.array([2.0, 0.0, 2.0, 1.0])
    assert found.logged.value == 0.5
    assert found.estimates["ips"].value == (2 + 2) / 4
    assert found.estimates["snips"].value == (2 + 2) / 5
    assert found.estimates["direct"].value == pytest.approx(0.6)
    assert found.estimates["doubly_robust"].value == pytest.approx(0.6 + (weights * np.array([0.5, -0.5, 0.5, -0.5])).mean())
    assert found.effective_rows == pytest.approx(25 / 9)
    assert found.mean_weight == 5 / 4
    assert "too few for an interval" in found.warnings[0]
    clipped = evaluate_policy(rows([1, 0, 1, 0], [0.5, 0.5, 0.25, 0.25], [1.0, 0.0, 0.5, 0.25]), clip=1)
    assert clipped.estimates["snips"].value == pytest.approx(2 / 3)
    assert clipped.clipped == pytest.approx(2 / 5)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Three actions with known rewards, a logging policy that favours one and another that favours another; 400 logs."""
    random = np.random.default_rng(0)
    reward, logging, target = np.array([0.02, 0.05, 0.1]), np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.3, 0.6])
    model = np.array([0.04, 0.04, 0.08])  # wrong, as models are
    truth, held = reward @ target, dict.fromkeys(("ips", "snips", "doubly_robust"), 0)
    widths = dict.fromkeys(held, 0.0)
    for _ in range(400):
        action = random.choice(3, 3000, p=logging)
        rewards = random.uniform(size=3000) < reward[action]
        log = rows(rewards, logging[action], target[action], expected_shown=model[action], expected_policy=np.full(3000, model @ target))
        found = evaluate_policy(log)
        assert not found.warnings
        for name in held:
            estimate = found.estimates[name]
            held[name] += estimate.low <= truth <= estimate.high
            widths[name] += estimate.high - estimate.low
    for name, times in held.items():
        assert 0.92 <= times / 400 <= 0.98, name
    assert widths["doubly_robust"] < widths["ips"]


def test_propensities_that_are_wrong_are_doubted():
    random = np.random.default_rng(1)
    action = random.choice(2, 5000, p=[0.8, 0.2])
    said = np.array([0.5, 0.5])[action]
    found = evaluate_policy(rows(random.uniform(size=5000) < 0.1, said, np.array([0.9, 0.1])[action]))
    assert any("instead of 1" in warning for warning in found.warnings)


def test_what_a_policy_chooses():
    scores, requests = np.array([0.1, 0.3, 0.3, 0.2, 0.9]), np.array([0, 0, 0, 1, 1])
    np.testing.assert_allclose(choices(scores, requests, "greedy", 0.3), [0.1, 0.45, 0.45, 0.15, 0.85])
    powers = np.exp(scores / 0.2)
    np.testing.assert_allclose(
        choices(scores, requests, "softmax", 0.2), powers / np.array([powers[:3].sum()] * 3 + [powers[3:].sum()] * 2)
    )


def test_candidates_become_decisions(tmp_path):
    frame = pl.DataFrame(
        {
            "request": ["b", "a", "b", "a"],
            "shown": [True, False, False, True],
            "click": [1, None, None, 0],
            "p": [0.5, None, None, 0.25],
            "score": [0.2, 0.9, 0.1, 0.3],
            "q": [0.4, 0.8, 0.2, 0.1],
        }
    )
    frame.write_parquet(tmp_path / "log.parquet")
    names = {"reward": "click", "propensity": "p", "request": "request", "shown": "shown", "score": "score", "expected": "q"}
    log = read_log(tmp_path, PolicyColumns(**names, chooses="greedy:0.2"))
    np.testing.assert_allclose(log.rewards, [0, 1])  # in the order of the requests
    np.testing.assert_allclose(log.targets, [0.1, 0.9])
    np.testing.assert_allclose(log.expected_policy, [0.9 * 0.8 + 0.1 * 0.1, 0.9 * 0.4 + 0.1 * 0.2])
    frame.with_columns(shown=pl.lit(True)).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="one row that was shown"):
        read_log(tmp_path, PolicyColumns(**names))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"propensities": [0.0, 0.5]}, "propensity: expected above 0 and at most 1. Received: '0.0 in row 0"),
        ({"propensities": [0.5, 1.5]}, "propensity"),
        ({"targets": [0.5, np.nan]}, "probability of the other policy"),
        ({"rewards": [np.nan, 1]}, "reward"),
        ({"targets": [0, 0]}, "could have shown"),
        ({"rewards": [], "propensities": [], "targets": []}, "rows of randomized traffic"),
        ({"rewards": [1], "propensities": [0.5], "targets": [0.5]}, "two requests or more. Received: 1"),
    ],
)
def test_wrong_logs_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        evaluate_policy(rows(**{"rewards": [0, 1], "propensities": [0.5, 0.5], "targets": [0.5, 0.5], **change}))


def test_wrong_columns_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--policy"):
        PolicyColumns(reward="click", propensity="p")
    with pytest.raises(ConfigError, match="--chooses"):
        PolicyColumns(reward="click", propensity="p", score="s", request="r", shown="s", chooses="softmax:0")
    columns = PolicyColumns(reward="click", propensity="p", policy="pi")
    with pytest.raises(DataError, match="Parquet files"):
        read_log(tmp_path, columns)
    pl.DataFrame({"click": [1], "p": [0.5]}).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="column 'pi'"):
        read_log(tmp_path, columns)


@pytest.fixture(scope="module")
def bandit():
    """Logs of two policies on the same site: ``(behaviour, campaign)`` to a frame."""
    if not (DATA / "open_bandit").is_dir():
        pytest.skip(f"no Open Bandit sample in {DATA}; set MLENV_DATA to the folder that has it")
    names = ["item_id", "position", "click", "propensity_score"]
    return {
        (kind, campaign): pl.read_csv(DATA / "open_bandit" / f"{kind}_{campaign}.csv.gz", columns=names)
        for kind in ("random", "bts")
        for campaign in ("men", "women")
    }


@pytest.mark.parametrize("campaign", ["men", "women"])
def test_the_random_policy_is_worth_what_it_earned(bandit, campaign):
    """Estimated from what the learned policy showed; and from its own log, where the estimate is the mean itself."""
    own, other = bandit["random", campaign], bandit["bts", campaign]
    mean = evaluate_policy(rows(own["click"], own["propensity_score"], own["propensity_score"])).estimates["snips"]
    assert mean.value == own["click"].mean()
    uniform = own["propensity_score"].mean()
    found = evaluate_policy(rows(other["click"], other["propensity_score"], np.full(len(other), uniform)))
    snips = found.estimates["snips"]
    assert snips.low <= mean.value <= snips.high
