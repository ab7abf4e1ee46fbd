"""The story of examples/lifecycle, as a user runs it, on a real MLflow server and a real model server."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mlenv.cli import main
from mlenv.errors import DONE
from mlenv.models.registry import CHAMPION, PREVIOUS, Registry
from tests.models.test_promotion import Server

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("MLENV_DATA", ROOT.parent / "shared" / "data"))

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow")]


def test_from_two_trainings_to_a_champion_in_traffic_and_back(tmp_path):
    if not (DATA / "kuairand").is_dir():
        pytest.skip(f"no KuaiRand sample in {DATA}; set MLENV_DATA to the folder that has it")
    assert main(["data", "convert", "kuairand", "--source", str(DATA / "kuairand"), "--out", str(tmp_path / "kuairand")]) == DONE
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = Server(tmp_path)
    server.start()
    try:
        places = {"DATA": "kuairand", "WORK": "life cycle", "PORT": str(port), "SECONDS_OF_LOAD": "5", "MLFLOW_TRACKING_URI": server.uri}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = ["sh", str(ROOT / "examples/lifecycle/story.sh")]
        story = subprocess.run(command, cwd=tmp_path, env=os.environ | places | {"PATH": path}, capture_output=True, text=True, check=False)
        assert story.returncode == DONE, story.stdout + story.stderr
        registry = Registry(server.uri)
        model = registry.model("videos")
    finally:
        server.stop()

    assert [move.kind for move in model.moves] == ["promoted", "held", "promoted", "rolled back"]
    assert model.aliases[CHAMPION] == "1"
    assert PREVIOUS not in model.aliases  # before the first champion there was none
    held = json.loads((tmp_path / "life cycle" / "held" / "promotion.json").read_text())
    assert not all(judgement["is_passed"] for judgement in held["judgements"])
    parity = json.loads((tmp_path / "life cycle" / "package" / "parity.json").read_text())
    assert max(parity["differences"].values()) < 1e-5
    requests, errors = re.search(r"([\d,]+) requests of 8 clients in 5 s, (\d+) errors", story.stdout).groups()
    assert int(requests.replace(",", "")) > 50
    assert errors == "0"
