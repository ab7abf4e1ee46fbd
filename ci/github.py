"""GitHub Actions: a job for each stage."""

from __future__ import annotations

from typing import Any, Final

from mlenv.ci.pipeline import EVENTS, HELD, Pipeline, Stage, header
from mlenv.ci.yaml_text import without_empty, yaml_text

FILE: Final = ".github/workflows/ci.yml"

_EVENT: Final = {"change": "pull_request", "main": "push", "nightly": "schedule"}
_MACHINE: Final = {"": "ubuntu-latest", "docker": "ubuntu-latest", "gpu": ["self-hosted", "gpu"]}


def render(pipeline: Pipeline) -> str:
    events = {event for stage in pipeline.stages.values() for event in stage.when}
    triggers: dict[str, Any] = {"push": {"branches": [pipeline.main]}, "pull_request": {}}
    if "nightly" in events:
        triggers["schedule"] = [{"cron": pipeline.nightly}]
    document = {
        "name": pipeline.name,
        "on": triggers,
        "permissions": {"contents": "read"},
        "concurrency": {
            "group": "${{ github.workflow }}-${{ github.ref }}-${{ github.event_name }}",
            "cancel-in-progress": "${{ github.event_name == 'pull_request' }}",
        },
        "jobs": {name: _job(name, stage, pipeline) for name, stage in pipeline.stages.items()},
    }
    return yaml_text(document, header("github")).replace("\n'on':\n", "\non:\n", 1)  # no boolean in the YAML of GitHub


def _job(name: str, stage: Stage, pipeline: Pipeline) -> dict[str, Any]:
    python = {"python-version": pipeline.python, "cache": "pip", "cache-dependency-path": pipeline.lock}
    steps: list[dict[str, Any]] = [
        {"uses": "actions/checkout@v4"},
        {"uses": "actions/setup-python@v5", "with": python},
        {"run": "\n".join([*pipeline.setup, *(_held(stage.steps[0]) if stage.may_be_held else stage.steps)])},
    ]
    if stage.artifacts:
        kept = {"name": name, "path": "\n".join(stage.artifacts), "if-no-files-found": "ignore"}
        steps.append({"uses": "actions/upload-artifact@v4", "if": "always()", "with": kept})
    return without_empty(
        {
            "if": _condition(stage),
            "needs": list(stage.needs),
            "runs-on": _MACHINE[stage.machine],
            "timeout-minutes": stage.timeout_minutes,
            "env": {secret: f"${{{{ secrets.{secret} }}}}" for secret in stage.secrets},
            "steps": steps,
        }
    )


def _condition(stage: Stage) -> str:
    if set(stage.when) == set(EVENTS):
        return ""
    return " || ".join(f"github.event_name == '{_EVENT[event]}'" for event in EVENTS if event in stage.when)


def _held(step: str) -> list[str]:
    """The step, with a warning in the place of a failure when a gate holds it: a job has no exit codes that are allowed."""
    return [
        "code=0",
        f"{step} || code=$?",
        f'if [ "$code" -eq {HELD} ]; then echo "::warning::held by a gate"; exit 0; fi',
        'exit "$code"',
    ]
