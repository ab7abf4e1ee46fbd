"""The documents: their links lead somewhere, their configs compose, their code runs, their names exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlenv import compose, train
from mlenv.cli import main
from mlenv.config import ExperimentConfig, ModelConfig, OptimizerConfig, WorkersConfig
from mlenv.datasets.ray_workers import RayConfig
from mlenv.loops.dense_optimizers import AdamWConfig
from mlenv.modules import CrossNetConfig, RankerConfig
from mlenv.modules.ranker import CrossingConfig
from mlenv.records.tracking import MlflowTracker

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
EVERY_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^```python\n((?:(?!```)[^\n]*\n)*)```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\S+\.(?:py|yaml))\n")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
DEFINED_IN = re.compile(r"`(\w+)` in \[[^\]]*\]\(([^)]+\.py)\)")
CONFIG_KEY = re.compile(r"`((?:schema|data|model|embeddings|optimizer|objective|loop|tracking|checks)\.(?!json`)[\w.]+)(?:: \S+|=\S+)?`")

STANDARD = {ModelConfig: RankerConfig, CrossingConfig: CrossNetConfig, OptimizerConfig: AdamWConfig, WorkersConfig: RayConfig}
"""What the documents mean where a config leaves the class open."""


def blocks(document: Path) -> Iterator[tuple[str, str, str]]:
    """Language, file name and text of every block. A block whose first line is a comment with a file name is that file."""
    for language, text in BLOCK.findall(document.read_text()):
        name = FILE_NAME.match(text)
        yield language, name[1] if name else "", text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ads: Path) -> Path:
    """A folder as a reader has it after the README: its files, a small log in work/ads, a training in work/first."""
    folder = tmp_path_factory.mktemp("a reader's folder")
    (folder / "work").mkdir()
    (folder / "work" / "ads").symlink_to(ads)
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, README, patch)
        train(compose("config.yaml", ["loop.max_steps=4", "tracking.enabled=false"]))
        # As if MLflow had not answered: what is to be sent is there.
        MlflowTracker(folder / "work/first", uri="", experiment="mlenv", run_name="first").log_artifact(folder / "work/first/config.yaml")
    return folder


def enter(folder: Path, document: Path, patch: pytest.MonkeyPatch) -> None:
    """Goes to the folder with the document's files in it, from where Python imports them."""
    patch.chdir(folder)
    patch.setattr(sys, "path", [str(folder), *sys.path])
    patch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # otherwise the command line would set it for all tests that follow
    for module in [name for name in sys.modules if name.partition(".")[0] == "my_ranker"]:
        patch.delitem(sys.modules, module)
    for _, name, text in blocks(document):
        if name:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)


@pytest.fixture
def at_the_document(document: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder, symlinks=True)
    enter(folder, README, monkeypatch)
    enter(folder, document, monkeypatch)


@EVERY_DOCUMENT
def test_links_lead_to_files(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    assert links
    assert [link for link in links if not (document.parent / link).exists()] == []


@EVERY_DOCUMENT
def test_named_functions_are_where_the_document_says(document: Path) -> None:
    for name, link in DEFINED_IN.findall(document.read_text()):
        source = (document.parent / link).read_text()
        assert re.search(rf"\b(def|class) {name}\b|^{name} = ", source, re.MULTILINE), f"{name} is not in {link}"


@EVERY_DOCUMENT
def test_named_keys_are_keys_of_the_config(document: Path) -> None:
    assert [key for key in CONFIG_KEY.findall(document.read_text()) if not is_key(key)] == []


def is_key(key: str) -> bool:
    hint: typing.Any = ExperimentConfig
    for part in key.split("."):
        if typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
            continue
        if hint in STANDARD and part == "kind":
            return True
        fields = typing.get_type_hints(STANDARD.get(hint, hint))
        if part not in fields:
            return False
        hint = fields[part]
        if typing.get_origin(hint) is types.UnionType:
            hint = typing.get_args(hint)[0]
    return True


def test_a_key_that_is_not_there_is_found() -> None:
    assert is_key("data.test.start")
    assert is_key("model.crossing.kind")
    assert not is_key("loop.max_stps")
    assert not is_key("data.test.begin")


@EVERY_DOCUMENT
@pytest.mark.usefixtures("at_the_document")
def test_configs_compose(document: Path) -> None:
    """A file that extends another or has a name of its own is whole; a block that is no file is a piece to put over the demo's config."""
    for language, name, text in blocks(document):
        if language == "yaml" and not name:
            Path("piece.yaml").write_text(f"extends: examples/demo/ranker.yaml\n{text}")
            compose("piece.yaml")
        elif language == "yaml" and re.search("^(name|extends):", text, re.MULTILINE):
            assert dataclasses.is_dataclass(compose(name))


@EVERY_DOCUMENT
@pytest.mark.usefixtures("at_the_document")
def test_code_runs(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A block of text right after it is what it prints."""
    shown = dict(SHOWN.findall(document.read_text()))
    for language, name, text in blocks(document):
        if language == "python" and not name:
            capsys.readouterr()
            exec(compile(text, document.name, "exec"), {})
            assert shown.get(text) in (None, capsys.readouterr().out)


@EVERY_DOCUMENT
@pytest.mark.usefixtures("at_the_document")
def test_commands_are_understood(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = (ROOT / "Makefile").read_text().partition(".PHONY:")[2].partition("\n")[0].split()
    for language, _, text in blocks(document):
        if language != "sh":
            continue
        for program, *arguments in map(shlex.split, text.splitlines()):
            if program == "mlenv":
                end = arguments.index("--") if "--" in arguments else len(arguments)
                assert main([*arguments[:end], "--dry-run", *arguments[end:]]) == 0, capsys.readouterr().err
            elif program == "make":
                assert set(arguments) <= set(targets)
