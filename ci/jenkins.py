"""Jenkins: a declarative pipeline for a multibranch job, its stages one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from mlenv.ci.pipeline import EVENTS, HELD, Pipeline, Stage, header

FILE: Final = "Jenkinsfile"

_LABEL: Final = {"": "linux", "docker": "docker", "gpu": "gpu"}


def render(pipeline: Pipeline) -> str:
    lines = [f"// {line}" for line in header("jenkins")]
    lines += _block("pipeline", _pipeline(pipeline))
    return "\n".join([*lines, ""])


def _pipeline(pipeline: Pipeline) -> Iterator[str]:
    yield "agent none"
    yield from _block("options", ["disableConcurrentBuilds()"])
    if any("nightly" in stage.when for stage in pipeline.stages.values()):
        yield from _block("triggers", [f"cron(env.BRANCH_NAME == {_text(pipeline.main)} ? {_text(pipeline.nightly)} : '')"])
    stages = [line for name, stage in pipeline.stages.items() for line in _block(f"stage({_text(name)})", _stage(stage, pipeline))]
    yield from _block("stages", stages)


def _stage(stage: Stage, pipeline: Pipeline) -> Iterator[str]:
    yield f"agent {{ label {_text(_LABEL[stage.machine])} }}"
    yield f"options {{ timeout(time: {stage.timeout_minutes}, unit: 'MINUTES') }}"
    if stage.secrets:
        yield from _block("environment", [f"{secret} = credentials({_text(secret)})" for secret in stage.secrets])
    if set(stage.when) != set(EVENTS):
        yield from _block("when", ["beforeAgent true", *_block("anyOf", _events(stage, pipeline))])
    yield from _block("steps", _held(stage.steps[0], pipeline.setup) if stage.may_be_held else _script([*pipeline.setup, *stage.steps]))
    if stage.artifacts:
        kept = ",".join(_files(path) for path in stage.artifacts)
        archive = f"archiveArtifacts(artifacts: {_text(kept)}, allowEmptyArchive: true)"
        yield from _block("post", _block("always", [archive]))


def _events(stage: Stage, pipeline: Pipeline) -> Iterator[str]:
    events = {
        "change": "changeRequest()",
        "main": f"allOf {{ branch {_text(pipeline.main)}; not {{ triggeredBy 'TimerTrigger' }} }}",
        "nightly": "triggeredBy 'TimerTrigger'",
    }
    return (events[event] for event in EVENTS if event in stage.when)


def _held(step: str, setup: Sequence[str]) -> list[str]:
    lines = [
        *(_script(setup) if setup else ()),
        f"int code = sh(returnStatus: true, script: {_text(step)})",
        f"if (code == {HELD}) {{ unstable('held by a gate') }}",
        'else if (code != 0) { error("exit code ${code}") }',
    ]
    return list(_block("script", lines))


def _script(steps: Sequence[str]) -> list[str]:
    """Lines of one shell, which ends at the first that fails."""
    if len(steps) == 1:
        return [f"sh {_text(steps[0])}"]
    return ["sh '''", *(f"    {_escaped(step)}" for step in steps), "'''"]


def _text(text: str) -> str:
    return f"'{_escaped(text)}'"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


def _files(path: str) -> str:
    """A folder as the pattern of its files, as Ant writes it; what looks like a file stays."""
    return path if "." in path.rsplit("/", 1)[-1] or path.endswith("*") else f"{path.rstrip('/')}/**"


def _block(head: str, lines: Iterable[str]) -> Iterator[str]:
    yield f"{head} {{"
    for line in lines:
        yield f"    {line}"
    yield "}"
