"""``mlenv image`` without an engine: what would be done, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlenv.cli import main


def test_a_dry_run_prints_the_dockerfile(
    repo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repo(environment={"TEAM": "ads"}))
    for arguments in (["build", "tiny", "--dry-run"], ["show", "tiny", "--dockerfile"]):
        assert main(["image", *arguments]) == 0
        assert 'ENV TEAM="ads"\n' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "tny"], "Received: 'tny'. Fix: did you mean 'tiny'."),
        (["build", "tiny", "--push"], "--push: expected a registry beside it"),
        (["build", "tiny", "user=1000"], "user=1000: expected no settings here"),
        (["build", "tiny", "--secret", "ca"], "--secret: expected NAME=FILE"),
        (["build", "tiny", "--timeout-minutes", "0"], "--timeout-minutes: expected a number > 0"),
        (["run", "tiny", "--env", "NOT_SET_HERE"], "--env: expected NAME=VALUE, or the name of a variable that is set here"),
        (["run", "tiny", "--gpus", "some", "--", "true"], "--gpus: expected auto, none, all or a number"),
        (["prune", "--keep", "-1"], "--keep: expected a number >= 0"),
        (["serve", "--folder", "there", "--tokens", "none"], "--tokens: expected a readable file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_ends_with_2(
    repo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(repo())
    monkeypatch.delenv("MLENV_IMAGE_REGISTRY", raising=False)
    assert main(["image", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_run_is_no_option_of_mlenv(
    repo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repo())
    assert main(["image", "run", "tiny", "--dry-run", "--", "mlenv", "train", "--dry-run", "a=b"]) == 0
    assert capsys.readouterr().out == "would run mlenv train --dry-run a=b in tiny\n"
    with pytest.raises(SystemExit):
        main(["image", "list", "--", "true"])
