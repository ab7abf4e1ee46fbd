"""Buildkite: a command step for each stage. The schedule itself is kept in the settings of the pipeline."""

from __future__ import annotations

from typing import Any, Final

from mlenv.ci.pipeline import EVENTS, HELD, Pipeline, Stage, header
from mlenv.ci.yaml_text import without_empty, yaml_text

FILE: Final = ".buildkite/pipeline.yml"


def render(pipeline: Pipeline) -> str:
    schedule = f"The pipeline's settings need a schedule for {pipeline.main}: {pipeline.nightly}"
    steps = [_step(name, stage, pipeline) for name, stage in pipeline.stages.items()]
    return yaml_text({"steps": steps}, [*header("buildkite"), schedule])


def _step(name: str, stage: Stage, pipeline: Pipeline) -> dict[str, Any]:
    return without_empty(
        {
            "label": name,
            "key": name,
            "if": _condition(stage, pipeline),
            "depends_on": list(stage.needs),
            "agents": {"queue": stage.machine} if stage.machine else {},
            "timeout_in_minutes": stage.timeout_minutes,
            "secrets": list(stage.secrets),
            # The upload of a pipeline would put its own variables in the place of the shell's.
            "commands": [step.replace("$", "$$") for step in (*pipeline.setup, *stage.steps)],
            "soft_fail": [{"exit_status": HELD}] if stage.may_be_held else [],
            "artifact_paths": list(stage.artifacts),
        }
    )


def _condition(stage: Stage, pipeline: Pipeline) -> str:
    if set(stage.when) == set(EVENTS):
        return ""
    events = {
        "change": "build.pull_request.id != null",
        "main": f'(build.branch == "{pipeline.main}" && build.pull_request.id == null && build.source != "schedule")',
        "nightly": 'build.source == "schedule"',
    }
    return " || ".join(events[event] for event in EVENTS if event in stage.when)
