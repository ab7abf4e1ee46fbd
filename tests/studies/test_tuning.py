"""What a search refuses before its first trial; test_trials.py runs one."""

from __future__ import annotations

import pytest
import yaml

from mlenv.cli import main
from mlenv.composition import compose
from mlenv.config.tuning import LogUniform, Uniform
from mlenv.errors import DONE, WRONG_INPUT, ConfigError, Problems
from mlenv.studies.tuning import check_search, compose_tuning, trial_overrides, tune, values_text

RATE = {"kind": "log_uniform", "low": 1e-4, "high": 1e-2}
HELD_OUT = {"data": {"validation": {"start": "2026-01-02", "end": "2026-01-02"}}, "loop": {"evaluate_every_steps": 5}}


@pytest.fixture
def search(tmp_path, tiny_config, monkeypatch):
    """Writes a search over a tiny config, in the current folder; without arguments, a good one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/base.yaml").write_text(tiny_config)

    def write(**changes):
        plain = {"config": "base.yaml", "output": "search", "metric": "click/auc", "num_trials": 2, "settings": HELD_OUT}
        plain |= {"space": {"optimizer.learning_rate": RATE}} | changes
        (tmp_path / "configs/tune.yaml").write_text(yaml.safe_dump(plain))
        return "configs/tune.yaml"

    return write


def test_a_trial_is_the_config_with_what_is_tried(search):
    config = compose_tuning(search(space={"model.crossing": {"kind": "choice", "values": [{"kind": "masknet"}]}, "seed": RATE}))
    assert config.config == "configs/base.yaml"
    overrides = trial_overrides(config, {"model.crossing": {"kind": "masknet"}, "seed": 3, "optimizer.learning_rate": 1e-05})
    assert overrides[-3:] == ('model.crossing={"kind": "masknet"}', "seed=3", "optimizer.learning_rate=1e-05")
    composed = compose(config.config, overrides)
    assert (composed.loop.monitor, composed.optimizer.learning_rate, composed.seed) == ("click/auc", 1e-5, 3)
    assert type(composed.model.crossing).__name__ == "MaskNetConfig"


def test_a_good_search_is_shown_and_nothing_is_written(search, tmp_path, capsys):
    assert main(["tune", search(), "num_trials=7", "settings.loop.max_steps=9", "--dry-run"]) == DONE
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["num_trials"], printed["settings"]["loop"]["max_steps"]) == (7, 9)
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"optimizer.learning_rat": RATE}}, r"optimizer\.learning_rat: .* Fix: did you mean 'learning_rate'"),
        ({"space": {"data.batch_size": RATE | {"low": 64, "high": 512}}}, r"data\.batch_size: expected a value of type int\. Received: "),
        ({"space": {"model.deep.dropout": {"kind": "uniform", "low": 0.1, "high": 1.5}}}, r"model\.deep\.dropout: .* Received: 1\.5"),
        ({"space": {"model.crossing.kind": {"kind": "choice", "values": ["masknet", "cross"]}}}, r"model\.crossing\.kind: .*'cross'"),
        ({"metric": "view/auc"}, r"loop\.monitor: .*Received: 'view/auc'"),
        ({"settings": {}}, r"data\.validation"),
        ({"settings": HELD_OUT | {"launch": {"num_processes": 2}}}, r"launch\.num_processes: expected 1: a trial is one process"),
        ({"metric": "click/acu"}, r"metric: .* did you mean 'auc'"),
        ({"space": {}}, r"space: expected at least one key of the config"),
        ({"space": {"output": {"kind": "choice", "values": ["x"]}}}, r"space: expected no output, which is the search's own"),
        ({"settings": HELD_OUT | {"optimizer": {"learning_rate": 0.1}}}, r"expected no key beside 'optimizer\.learning_rate'"),
        ({"space": {"seed": {"kind": "integers", "low": 0, "high": 5, "step": 2}}}, r"space\.seed\.high: expected 0 and a multiple of 2"),
        ({"early_stopping": {"kind": "asha", "reduction_factor": 1}}, r"early_stopping\.reduction_factor: expected a number >= 2"),
    ],
)
def test_what_no_trial_could_be_trained_with_is_refused(search, tmp_path, changes, message):
    with pytest.raises(Problems, match=message):
        check_search(compose_tuning(search(**changes)))
    assert not (tmp_path / "search").exists()


def test_every_problem_is_said_once(search, capsys):
    space = {"optimizer.learning_rat": RATE, "model.deep.dropout": {"kind": "choice", "values": [0.1, 0.2, -1.0, -2.0]}}
    assert main(["tune", search(space=space), "--dry-run"]) == WRONG_INPUT
    text = capsys.readouterr().err
    assert text.count("learning_rat'") + text.count("optimizer.learning_rat:") >= 1
    assert (text.count("Received: -1.0"), text.count("Received: -2.0")) == (1, 1)


def test_extremes_hold_a_number_that_is_not_whole():
    for space in (Uniform(low=1, high=4), LogUniform(low=1, high=4)):
        low, between, high = space.extremes
        assert (low, high) == (1, 4)
        assert 1 < between < 4
        assert between != round(between)


def test_a_folder_without_a_parent_is_refused(search):
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError, match="a folder whose parent exists"):
        tune(search(output="nowhere/search"))


def test_values_for_people():
    assert values_text({"optimizer.learning_rate": 0.00123456, "seed": 3}) == "optimizer.learning_rate=0.001235, seed=3"
