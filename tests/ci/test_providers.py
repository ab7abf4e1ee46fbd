"""Rendered pipelines: each passes the schema of its provider, runs what it should when it should, and is still what is committed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dekobon_tree_sitter_groovy
import pytest
import yaml
from check_jsonschema import main as check_schema
from tree_sitter import Language, Node, Parser

from mlenv.ci.pipeline import HELD, Pipeline, Stage, read_pipeline
from mlenv.ci.providers import PROVIDERS
from mlenv.cli import main
from mlenv.errors import DONE, FAILED, WRONG_INPUT

ROOT = Path(__file__).resolve().parent.parent.parent
SCHEMAS = {"github": "vendor.github-workflows", "gitlab": "vendor.gitlab-ci", "buildkite": "vendor.buildkite"}

PIPELINE = Pipeline(
    name="ranker's",
    nightly="30 2 * * 1-5",
    setup=("make install",),
    stages={
        "test": Stage(steps=("make test", "echo \"it's $HOME\" '\\n'"), artifacts=("work/report.html", "work/pages/")),
        "gpu": Stage(steps=("make gpu",), needs=("test",), when=("main",), gpu=True),
        "push": Stage(steps=("make push",), needs=("test", "gpu"), when=("main",), docker=True, secrets=("PASSWORD",)),
        "audit": Stage(steps=("make audit",), when=("change", "main", "nightly"), timeout_minutes=5),
        "promote": Stage(steps=("mlenv promote ranker",), when=("nightly",), may_be_held=True),
    },
)

DECLARED = {
    "pipeline": {"agent", "none", "options", "triggers", "stages"},
    "options": {"disableConcurrentBuilds", "timeout"},
    "triggers": {"cron"},
    "stages": {"stage", ""},
    "stage": {"agent", "options", "environment", "when", "steps", "post"},
    "agent": {"label"},
    "when": {"beforeAgent", "anyOf"},
    "anyOf": {"changeRequest", "allOf", "triggeredBy"},
    "allOf": {"branch", "not"},
    "not": {"triggeredBy"},
    "post": {"always"},
    "always": {"archiveArtifacts"},
    "steps": {"sh", "script"},
}
"""What Jenkins takes inside a block: as much of "Pipeline Syntax" in its handbook as is rendered."""


@pytest.fixture(scope="module", params=["every option", ".", "examples/model_repo/first_ranker"])
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    """One that uses every option, that of this repo, and that of a model repo."""
    return PIPELINE if request.param == "every option" else read_pipeline(ROOT / request.param / "mlenv.yaml")


@pytest.mark.parametrize("provider", SCHEMAS)
def test_a_pipeline_passes_the_schema_of_its_provider(provider: str, pipeline: Pipeline, tmp_path: Path) -> None:
    file, wrong = tmp_path / "pipeline.yml", tmp_path / "wrong.yml"
    file.write_text(PROVIDERS[provider].render(pipeline))
    wrong.write_text(re.sub("timeout[a-z_-]*: ", "timeout_of_the_job: ", file.read_text()))
    codes = [check_schema(["--builtin-schema", SCHEMAS[provider], str(path)], standalone_mode=False) for path in (file, wrong)]
    assert codes == [DONE, FAILED]


def parse_groovy(text: str) -> Node:
    return Parser(Language(dekobon_tree_sitter_groovy.language())).parse(text.encode()).root_node


def first_word(node: Node) -> str:
    assert node.text is not None
    word = re.match(r"\w+", node.text.decode())
    return word[0] if word else ""


def blocks(node: Node, inside: str = "") -> Iterator[tuple[str, str]]:
    """Each statement of a Jenkinsfile by its first word, with the block that it stands in; that of a stage comes after its name."""
    for child in node.named_children:
        if node.type in ("source_file", "closure") and child.type not in ("line_comment", "ERROR"):
            yield inside, first_word(child)
        yield from blocks(child, first_word(node) or "stage" if child.type == "closure" else inside)


def test_a_jenkinsfile_is_groovy_and_has_only_what_jenkins_declares(pipeline: Pipeline) -> None:
    text = PROVIDERS["jenkins"].render(pipeline)
    tree = parse_groovy(text)
    assert not tree.has_error
    assert parse_groovy(text.replace("stages {", "stages ", 1)).has_error
    found = list(blocks(tree))
    assert sum(name == "stage" for block, name in found if block == "stages") == len(pipeline.stages)
    assert [(block, name) for block, name in found if block in DECLARED and name not in DECLARED[block]] == []
    wrong = list(blocks(parse_groovy("pipeline { stages { stage('a') { stepz { sh 'x' } } } }")))
    assert ("stage", "stepz") in wrong


def loaded(provider: str) -> dict[str, Any]:
    document = yaml.load(PROVIDERS[provider].render(PIPELINE), yaml.BaseLoader)  # no dates and booleans, as YAML 1.2 has it
    assert isinstance(document, dict)
    return document


def test_github_runs_each_stage_when_it_should() -> None:
    document = loaded("github")
    assert document["on"] == {"push": {"branches": ["main"]}, "pull_request": {}, "schedule": [{"cron": "30 2 * * 1-5"}]}
    jobs = document["jobs"]
    assert list(jobs) == list(PIPELINE.stages)
    assert jobs["test"]["if"] == "github.event_name == 'pull_request' || github.event_name == 'push'"
    assert jobs["promote"]["if"] == "github.event_name == 'schedule'"
    assert "if" not in jobs["audit"]
    assert (jobs["gpu"]["runs-on"], jobs["push"]["runs-on"]) == (["self-hosted", "gpu"], "ubuntu-latest")
    assert jobs["push"]["needs"] == ["test", "gpu"]
    assert jobs["push"]["env"] == {"PASSWORD": "${{ secrets.PASSWORD }}"}
    *_, run, upload = jobs["test"]["steps"]
    assert run == {"run": "make install\nmake test\necho \"it's $HOME\" '\\n'"}
    assert upload["with"] == {"name": "test", "path": "work/report.html\nwork/pages/", "if-no-files-found": "ignore"}


@pytest.mark.parametrize(("code", "expected"), [(DONE, DONE), (HELD, DONE), (FAILED, FAILED), (WRONG_INPUT, WRONG_INPUT)])
def test_a_gate_that_holds_is_a_warning_on_github(code: int, expected: int, tmp_path: Path) -> None:
    for name, ends in (("make", DONE), ("mlenv", code)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {ends}\n")
        (tmp_path / name).chmod(0o755)
    script = loaded("github")["jobs"]["promote"]["steps"][-1]["run"]
    process = subprocess.run(["/bin/bash", "-e", "-c", script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert process.returncode == expected
    assert process.stdout == ("::warning::held by a gate\n" if code == HELD else "")


def test_gitlab_runs_each_stage_when_it_should() -> None:
    document = loaded("gitlab")
    change = {"if": '$CI_PIPELINE_SOURCE == "merge_request_event"'}
    main_branch = {"if": '$CI_PIPELINE_SOURCE == "push" && $CI_COMMIT_BRANCH == "main"'}
    nightly = {"if": '$CI_PIPELINE_SOURCE == "schedule"'}
    assert document["workflow"]["rules"] == document["audit"]["rules"] == [change, main_branch, nightly]
    assert document["test"]["rules"] == [change, main_branch]
    assert (document["gpu"]["rules"], document["gpu"]["tags"], document["gpu"]["needs"]) == ([main_branch], ["gpu"], ["test"])
    assert (document["test"]["needs"], document["push"]["tags"]) == ([], ["docker"])
    assert document["test"]["script"] == ["make install", *PIPELINE.stages["test"].steps]
    assert document["promote"]["allow_failure"] == {"exit_codes": [str(HELD)]}
    assert document["test"]["artifacts"] == {"when": "always", "paths": ["work/report.html", "work/pages/"]}
    assert document["audit"]["timeout"] == "5 minutes"


def test_buildkite_runs_each_stage_when_it_should() -> None:
    steps = {step["key"]: step for step in loaded("buildkite")["steps"]}
    assert list(steps) == list(PIPELINE.stages)
    assert steps["promote"]["if"] == 'build.source == "schedule"'
    assert steps["promote"]["soft_fail"] == [{"exit_status": str(HELD)}]
    assert "if" not in steps["audit"]
    assert steps["gpu"]["agents"] == {"queue": "gpu"}
    assert steps["push"]["depends_on"] == ["test", "gpu"]
    assert steps["push"]["secrets"] == ["PASSWORD"]
    assert steps["test"]["commands"] == ["make install", "make test", "echo \"it's $$HOME\" '\\n'"]


def test_jenkins_runs_each_stage_when_it_should() -> None:
    text = PROVIDERS["jenkins"].render(PIPELINE)
    assert "cron(env.BRANCH_NAME == 'main' ? '30 2 * * 1-5' : '')" in text
    stages = {part.partition("'")[0]: part for part in text.split("stage('")[1:]}
    assert list(stages) == list(PIPELINE.stages)
    assert "changeRequest()" in stages["test"]
    assert "allOf { branch 'main'; not { triggeredBy 'TimerTrigger' } }" in stages["gpu"]
    assert "when {" not in stages["audit"]
    assert "agent { label 'gpu' }" in stages["gpu"]
    assert "PASSWORD = credentials('PASSWORD')" in stages["push"]
    assert r"""echo "it\'s $HOME" \'\\n\'""" in stages["test"]
    assert "artifacts: 'work/report.html,work/pages/**'" in stages["test"]
    assert "if (code == 3) { unstable('held by a gate') }" in stages["promote"]


def test_the_pipeline_of_this_repo_is_what_is_committed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["ci", "render", "--provider", "github", "--check"]) == DONE, capsys.readouterr().out


def test_a_file_that_drifted_is_shown_and_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declared = tmp_path / "mlenv.yaml"
    declared.write_text("pipeline: {name: ranker, stages: {test: {steps: [make test]}}}")
    arguments = ["ci", "render", "--provider", "gitlab", "--file", str(declared)]
    out = tmp_path / ".gitlab-ci.yml"
    assert main([*arguments, "--check"]) == FAILED
    assert "+    - make test" in capsys.readouterr().out
    assert main([*arguments, "--dry-run"]) == DONE
    rendered = capsys.readouterr().out
    assert not out.exists()
    assert main(arguments) == DONE
    assert out.read_text() == rendered
    assert main([*arguments, "--check"]) == DONE
    capsys.readouterr()
    out.write_text(rendered.replace("make test", "make tests"))
    assert main([*arguments, "--check"]) == FAILED
    shown = capsys.readouterr().out
    assert "-    - make tests\n+    - make test" in shown
    assert "Fix: mlenv ci render --provider gitlab." in shown
    assert out.read_text() != rendered
    with pytest.raises(SystemExit, match=str(WRONG_INPUT)):
        main(["ci", "render", "--provider", "gitlub"])
    assert main(["ci", "render", "--provider", "github", "--file", str(tmp_path / "no.yaml")]) == WRONG_INPUT
