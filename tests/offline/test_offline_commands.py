from __future__ import annotations

import json

import polars as pl
import pytest

from mlenv.cli import main
from mlenv.errors import DONE, WRONG_INPUT


def test_a_model_beside_itself(stored_ranker, tmp_path, capsys):
    name = str(stored_ranker)
    assert main(["offline", "compare", name, name, "--out", str(tmp_path / "pair")]) == DONE
    text = capsys.readouterr().out
    assert "gain +0.00000, interval +0.00000 to +0.00000; no sure difference" in text
    document = json.loads((tmp_path / "pair" / "comparison.json").read_text())
    (auc,) = [one for one in document["figures"] if (one["task"], one["metric"], one["segment"]) == ("click", "auc", "")]
    assert auc["value"] == auc["champion"]
    assert "Two models on the same rows" in (tmp_path / "pair" / "comparison.html").read_text()
    assert main(["offline", "compare", name, str(tmp_path)]) == WRONG_INPUT
    assert "SECOND" in capsys.readouterr().err


def test_a_policy_and_a_track_record(tmp_path, capsys):
    log, table = tmp_path / "log.parquet", tmp_path / "tests.csv"
    pl.DataFrame({"click": [1, 0] * 200, "p": [0.5] * 400, "pi": [0.6, 0.4] * 200}).write_parquet(log)
    names = ["--reward", "click", "--propensity", "p"]
    assert main(["offline", "policy", str(log), *names, "--policy", "pi", "--out", str(tmp_path / "policy.json")]) == DONE
    assert "snips          0.600000" in capsys.readouterr().out
    assert json.loads((tmp_path / "policy.json").read_text())["estimates"]["snips"]["value"] == pytest.approx(0.6)
    assert main(["offline", "policy", str(log), *names]) == WRONG_INPUT
    assert "--policy" in capsys.readouterr().err
    pl.DataFrame({"auc": [0.1, 0.2], "online": [1.0, 2.0], "online_error": [0.5, 0.5]}).write_csv(table)
    assert main(["offline", "track", str(table), "--out", str(tmp_path / "track.json")]) == DONE
    assert "too few to say anything" in capsys.readouterr().out
    assert main(["offline", "track", str(log)]) == WRONG_INPUT
