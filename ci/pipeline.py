"""What a pipeline does: shell steps in stages, when each runs and on which machine. Section ``pipeline`` of mlenv.yaml."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from mlenv.composition import from_plain
from mlenv.errors import GATE, ConfigError, MlenvError, Problems, check_at_least, nearest

EVENTS: Final = ("change", "main", "nightly")
"""A change that is proposed (a pull or merge request); a push to the main branch; the schedule."""

FILE: Final = "mlenv.yaml"

HELD: Final = GATE
"""Exit code of a step that a gate held: shown as a warning where ``may_be_held`` says so, for it is an answer and no failure."""

_NAME: Final = re.compile("[a-z][a-z0-9-]*")
_VARIABLE: Final = re.compile("[A-Z][A-Z0-9_]*")
_CRON: Final = re.compile(r"[0-9*/,-]+( [0-9*/,-]+){4}")
_RESERVED: Final = {"cache", "default", "image", "include", "pages", "services", "spec", "stages", "types", "variables", "workflow"}
"""Keys of a GitLab file that are no jobs."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One job: a fresh checkout on one machine, and steps that end at the first that fails."""

    steps: tuple[str, ...]
    """Lines for sh, one after the other."""
    when: tuple[str, ...] = ("change", "main")
    """Some of EVENTS."""
    needs: tuple[str, ...] = ()
    """Stages before it that must have passed; each runs whenever this one does."""
    artifacts: tuple[str, ...] = ()
    """Files and folders to keep, also when a step fails; those that are not there are left out."""
    secrets: tuple[str, ...] = ()
    """Environment variables whose values the provider keeps, such as MLFLOW_TRACKING_URI or a registry's password."""
    docker: bool = False
    """Needs a machine with a container engine."""
    gpu: bool = False
    """Needs a machine with a GPU and a container engine."""
    may_be_held: bool = False
    """Its one step ends with exit code 3 when a gate holds it: a warning, no failure."""
    timeout_minutes: int = 30

    def __post_init__(self) -> None:
        check_at_least("timeout_minutes", self.timeout_minutes, 1)
        if not self.steps:
            raise ConfigError("steps", expected="at least one line for sh", received=[])
        _check_lines("steps", self.steps)
        if not self.when:
            raise ConfigError("when", expected=f"some of {', '.join(EVENTS)}", received=[])
        for event in self.when:
            if event not in EVENTS:
                raise ConfigError("when", expected=f"some of {', '.join(EVENTS)}", received=event, fix=nearest(event, EVENTS))
        for name in self.secrets:
            if not _VARIABLE.fullmatch(name):
                raise ConfigError("secrets", expected="names of environment variables, in capitals", received=name)
        if self.may_be_held and len(self.steps) != 1:
            fix = "put the other steps into a stage of their own"
            raise ConfigError("steps", expected="one step in a stage that may be held", received=list(self.steps), fix=fix)

    @property
    def machine(self) -> str:
        """What the machine is called that it needs; empty for any."""
        return "gpu" if self.gpu else "docker" if self.docker else ""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Stages in an order in which they can run."""

    name: str
    stages: dict[str, Stage]
    setup: tuple[str, ...] = ()
    """Steps that every stage begins with, such as those that install the packages."""
    main: str = "main"
    """The branch that is built from."""
    nightly: str = "0 3 * * *"
    """Minute, hour, day, month and weekday of the schedule, in UTC where the provider has no other."""
    python: str = "3.12"
    """Version on machines of the provider."""
    lock: str = "requirements.txt"
    """File of packages; what pip has downloaded is kept until it changes."""

    def __post_init__(self) -> None:
        _check_lines("setup", self.setup)
        if problems := list(self._problems()):
            raise Problems("pipeline", problems)

    def _problems(self) -> Iterator[MlenvError]:
        for key, pattern, expected in (
            ("nightly", _CRON, "five fields of cron, of digits and */,-"),
            ("python", re.compile(r"3\.\d+"), "a version such as '3.12'"),
            ("main", re.compile(r"[\w./-]+"), "the name of a branch"),
        ):
            if not pattern.fullmatch(getattr(self, key)):
                yield ConfigError(key, expected=expected, received=getattr(self, key))
        if not self.stages:
            yield ConfigError("stages", expected="at least one", received="none")
        before: dict[str, Stage] = {}
        for name, stage in self.stages.items():
            if not _NAME.fullmatch(name) or name in _RESERVED:
                expected = f"small letters, digits and dashes, and none of {', '.join(sorted(_RESERVED))}"
                yield ConfigError(f"stages.{name}", expected=expected, received=name)
            for needed in stage.needs:
                yield from _needed_problems(f"stages.{name}.needs", stage, needed, before)
            before[name] = stage


def _check_lines(key: str, steps: Sequence[str]) -> None:
    for step in steps:
        if not step.strip() or "\n" in step:
            fix = "put further lines into steps of their own: all steps of a stage share one shell"
            raise ConfigError(key, expected="one line for sh in each", received=step, fix=fix)


def _needed_problems(key: str, stage: Stage, needed: str, before: dict[str, Stage]) -> Iterator[MlenvError]:
    if needed not in before:
        yield ConfigError(key, expected="a stage that is written before it", received=needed, fix=nearest(needed, before))
        return
    if before[needed].may_be_held:
        yield ConfigError(key, expected="a stage that a gate does not hold", received=needed)
    missing = [event for event in stage.when if event not in before[needed].when]
    if missing:
        fix = f"add {', '.join(missing)} to stages.{needed}.when, or take it out of this one's"
        yield ConfigError(key, expected=f"a stage that runs on {', '.join(missing)} too", received=needed, fix=fix)


def read_pipeline(file: Path) -> Pipeline:
    """
    Raises:
        ConfigError: the file is missing, is not YAML, or has no section ``pipeline``.
        Problems: names everything that is wrong in it.
    """
    try:
        plain = yaml.safe_load(file.read_text())
    except OSError as error:
        fix = "run in the folder of a repo that mlenv init made, or name the file with --file"
        raise ConfigError(str(file), expected="a readable YAML file", received=error.strerror or str(error), fix=fix) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), expected="YAML", received=" ".join(str(error).split())) from error
    section = plain.get("pipeline") if isinstance(plain, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: pipeline", expected="a section with name and stages", received=section)
    pipeline: Pipeline = from_plain(section, Pipeline, str(file))
    return pipeline


def header(provider: str) -> Sequence[str]:
    """What a rendered file says about itself."""
    return (f"Made from {FILE} by `mlenv ci render --provider {provider}`. Do not edit: `--check` compares.",)
