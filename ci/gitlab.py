"""GitLab CI: a job for each stage. The schedule itself is kept in the settings of the project."""

from __future__ import annotations

from typing import Any, Final

from mlenv.ci.pipeline import EVENTS, HELD, Pipeline, Stage, header
from mlenv.ci.yaml_text import without_empty, yaml_text

FILE: Final = ".gitlab-ci.yml"

_PIP_CACHE: Final = ".cache/pip"


def render(pipeline: Pipeline) -> str:
    rules = _rules(pipeline)
    document = {
        "workflow": {"rules": list(rules.values())},
        "default": {
            "image": f"python:{pipeline.python}",
            "cache": {"key": {"files": [pipeline.lock]}, "paths": [_PIP_CACHE]},
        },
        "variables": {"PIP_CACHE_DIR": f"$CI_PROJECT_DIR/{_PIP_CACHE}"},
        **{name: _job(stage, pipeline, rules) for name, stage in pipeline.stages.items()},
    }
    schedule = f"Build > Pipeline schedules needs one for {pipeline.main}: {pipeline.nightly}"
    return yaml_text(document, [*header("gitlab"), schedule])


def _rules(pipeline: Pipeline) -> dict[str, dict[str, str]]:
    return {
        "change": {"if": '$CI_PIPELINE_SOURCE == "merge_request_event"'},
        "main": {"if": f'$CI_PIPELINE_SOURCE == "push" && $CI_COMMIT_BRANCH == "{pipeline.main}"'},
        "nightly": {"if": '$CI_PIPELINE_SOURCE == "schedule"'},
    }


def _job(stage: Stage, pipeline: Pipeline, rules: dict[str, dict[str, str]]) -> dict[str, Any]:
    job = without_empty(
        {
            "rules": [rules[event] for event in EVENTS if event in stage.when],
            "tags": [stage.machine] if stage.machine else [],
            "timeout": f"{stage.timeout_minutes} minutes",
            "script": [*pipeline.setup, *stage.steps],
            "allow_failure": {"exit_codes": [HELD]} if stage.may_be_held else {},
            "artifacts": {"when": "always", "paths": list(stage.artifacts)} if stage.artifacts else {},
        }
    )
    return {"needs": list(stage.needs)} | job  # an empty list too: it begins at once
