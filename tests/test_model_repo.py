"""What ``mlenv init`` writes, and what it refuses. tests/test_packaging.py runs what it wrote."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import yaml

from mlenv.ci.pipeline import read_pipeline
from mlenv.ci.providers import PROVIDERS
from mlenv.cli import main
from mlenv.composition import compose
from mlenv.errors import DONE, WRONG_INPUT
from mlenv.model_repo import FILES, TEMPLATES, make_model_repo

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples/model_repo/first_ranker"


@pytest.fixture(autouse=True)
def _paths_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line puts the current folder on the path, and a repo's package would be found by the tests that follow."""
    monkeypatch.setattr(sys, "path", list(sys.path))


IGNORED = {"__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".venv", "work"}


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not IGNORED & set(path.relative_to(folder).parts))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_the_example_is_what_is_made(tmp_path: Path) -> None:
    """`make lint` holds the example to ruff and mypy --strict, and so what is made everywhere."""
    made = make_model_repo(tmp_path / "first_ranker")
    assert [path.as_posix() for path in made] == sorted(contents(EXAMPLE))
    anew = f"remove {EXAMPLE.relative_to(ROOT)} and make it anew: mlenv init {EXAMPLE.relative_to(ROOT)}"
    assert contents(tmp_path / "first_ranker") == contents(EXAMPLE), anew


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_repo_has_the_pipeline_of_its_provider(provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_ranker").mkdir()  # an empty folder will do
    assert main(["init", str(tmp_path / "their_ranker"), "--provider", provider]) == DONE
    monkeypatch.chdir(tmp_path / "their_ranker")
    assert main(["ci", "render", "--provider", provider, "--check"]) == DONE
    texts = contents(Path())
    assert len(texts) == len(FILES) + 2  # the package's __init__ and the pipeline
    assert not [name for name, text in texts.items() if "first_ranker" in text or ("$$" in text and name != PROVIDERS[provider].file)]
    targets = {line.partition(":")[0] for line in texts["Makefile"].splitlines() if line[:1].isalpha()}
    steps = [step for stage in read_pipeline(Path("mlenv.yaml")).stages.values() for step in stage.steps]
    called = {words[1] for words in map(shlex.split, steps) if words[0] == "make"}
    assert called - {"work/ads"} <= targets
    assert called >= {"lint", "types", "test", "demo", "image", "gpu", "push", "retrain"}


def test_the_hooks_and_the_config_name_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model_repo(tmp_path / "their_ranker")
    monkeypatch.chdir(tmp_path / "their_ranker")
    monkeypatch.syspath_prepend(str(tmp_path / "their_ranker"))
    config = compose("config.yaml")
    assert config.name == "their_ranker"
    assert type(config.model).__module__ == "their_ranker.model"
    hooks = yaml.safe_load(Path(".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-format", "ruff-check", "mypy", "file-sizes", "pipeline"]
    images = yaml.safe_load(Path("mlenv.yaml").read_text())["images"]
    for image in images.values():
        assert all(Path(file).exists() for file in image["files"])


def test_every_template_is_used_once() -> None:
    assert sorted(path.name for path in TEMPLATES.iterdir()) == sorted(f"{name}.template" for name in FILES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "My-Ranker",
            "NAME: expected a name for a Python package: small letters, digits and _. Received: 'My-Ranker'. Fix: name it my_ranker",
        ),
        ("2towers", "Fix: name it towers"),
        ("class", "Received: 'class'. Fix: name it my_ranker"),
        ("json", "NAME: expected a name that no other package has. Received: 'json'. Fix: name it json_ranker"),
        ("torch", "NAME: expected a name that no other package has"),
        ("mlenv", "NAME: expected a name that no other package has"),
        ("tests", "NAME: expected a name that no other package has"),
        ("there", "expected a new or an empty folder. Received: 'one that holds files'. Fix: choose another name"),
        ("file", "expected a new or an empty folder"),
        ("no/such/ranker", "expected a folder whose parent exists"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for dry_run in ([], ["--dry-run"]):
        assert main(["init", str(tmp_path / name), *dry_run]) == WRONG_INPUT
        assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_an_unknown_provider_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "their_ranker"), "--provider", "gitlub"]) == WRONG_INPUT
    assert "--provider: expected a service that runs pipelines. Received: 'gitlub'. Fix: did you mean 'gitlab'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["init", str(tmp_path / "their_ranker"), "--dry-run"]) == DONE
    assert list(tmp_path.iterdir()) == []
