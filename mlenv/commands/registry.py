"""The commands about registered models: ``mlenv register``, ``promote``, ``rollback``, ``models``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mlenv.errors import DONE, GATE, ConfigError

if TYPE_CHECKING:
    from mlenv.models.registry import ModelVersion, Move, RegisteredModel, Registry

_FIGURES: Final = ("auc", "normalized_entropy", "calibration")
_WINDOWS: Final = ("train window", "validation window", "test window")
_ORIGINS: Final = ("teacher", "teacher version", "warm start", "warm start version", "image")


def add_registry_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line; ``verb`` makes one."""
    made = verb(verbs, "register", _register, "Make the model of a finished training a version of a registered model, and its challenger.")
    made.add_argument("output", type=Path, help="output folder of the training")
    made.add_argument("--name", required=True, help="of the registered model; made when there is none")
    _add_uri(made, "otherwise where the training is tracked")

    text = "Make a version champion when it passes all gates, among them those against the champion; exit code 3 when it is held."
    made = verb(verbs, "promote", _promote, text)
    made.add_argument("name", help="registered model")
    made.add_argument("--version", default="challenger", help="number or alias of the version; challenger when left out")
    made.add_argument("--gates", type=Path, metavar="FILE", help="YAML file of the gates, instead of those of the challenger's config")
    made.add_argument(
        "--data",
        type=Path,
        metavar="CONFIG",
        help="config whose test window both are measured on, instead of the challenger's; settings may follow",
    )
    made.add_argument("--trial", action="store_true", help="judge and report, and neither move nor record anything")
    made.add_argument("--force", action="store_true", help="make it champion whatever the gates say; needs --reason")
    made.add_argument("--reason", default="", help="why, for the history")
    made.add_argument("--out", type=Path, help="folder for promotion.html and promotion.json, beside MLflow's")
    _add_uri(made)

    made = verb(verbs, "rollback", _rollback, "Make the version champion again that was it before.")
    made.add_argument("name", help="registered model")
    made.add_argument("--reason", default="", help="why, for the history")
    _add_uri(made)

    made = verb(verbs, "models", _models, "List registered models; of one its versions, where they come from, and every move.")
    made.add_argument("name", nargs="?", default="", help="registered model")
    _add_uri(made)


def _add_uri(made: argparse.ArgumentParser, otherwise: str = "otherwise where training puts runs by default") -> None:
    made.add_argument("--uri", default="", help=f"where MLflow is, as in tracking.uri; {otherwise}")


def _register(options: argparse.Namespace) -> int:
    if options.dry_run:
        from mlenv.records.tracking import tracked_run

        print(f"would register {options.output} (run {tracked_run(options.output).run_id or 'pending'}) as {options.name}")
        return DONE
    from mlenv.models.registration import register

    result = register(options.output, options.name, options.uri)
    print(f"{result.version}" if result.is_new else f"{result.version}, which was registered before")
    return DONE


def _promote(options: argparse.Namespace) -> int:
    if options.overrides and options.data is None:
        received = " ".join(options.overrides)
        raise ConfigError(received, expected="settings of the config of --data", received=received, fix="name it: --data CONFIG")
    if options.force and not options.reason:
        raise ConfigError("--reason", expected="a reason beside --force", received="", fix="say why the gates do not count this time")
    data = None
    if options.data is not None:
        from mlenv.composition import compose

        data = compose(options.data, options.overrides)
    if options.dry_run:
        if options.gates is not None:
            from mlenv.composition import from_plain, load
            from mlenv.config import GatesConfig

            from_plain(load(options.gates), GatesConfig, str(options.gates))
        print(f"would hold {options.version} of {options.name} against its champion, and promote it when it passes")
        return DONE
    from mlenv.models.promotion import PAGE, promote

    result = promote(
        options.name,
        version=options.version,
        uri=options.uri,
        gates=options.gates,
        data=data,
        force=options.force,
        reason=options.reason,
        is_trial=options.trial,
        out=options.out,
    )
    for failure in result.verdict.failures:
        print(f"HELD  {failure.gate}  {failure.subject}\n      {failure.detail}")
    print(f"{len(result.verdict.failures)} of {len(result.verdict.judgements)} judgements are against {result.challenger}")
    is_moved = result.move is not None and result.move.kind != "held"
    if is_moved:
        print(f"champion {result.challenger.name} version {result.challenger.version}")
    if result.report:
        print(f"report   {result.report}")
    if options.out is not None:
        print(f"page     {options.out / PAGE}")
    return DONE if is_moved or result.verdict.is_passed else GATE


def _rollback(options: argparse.Namespace) -> int:
    if options.dry_run:
        print(f"would make the previous champion of {options.name} champion again")
        return DONE
    from mlenv.models.promotion import rollback

    move = rollback(options.name, uri=options.uri, reason=options.reason)
    print(f"champion {options.name} version {move.version}, instead of version {move.before}")
    return DONE


def _models(options: argparse.Namespace) -> int:
    from mlenv.records.mlflow_outbox import without_password
    from mlenv.records.mlflow_store import store_uri

    if options.dry_run:
        print(f"would read the registered models of {without_password(store_uri(options.uri))}")
        return DONE
    from mlenv.models.registry import Registry

    registry = Registry(options.uri)
    if options.name:
        print(model_text(registry.model(options.name), registry.versions(options.name)))
    else:
        print(list_text(registry))
    return DONE


def list_text(registry: Registry) -> str:
    """A line for each registered model."""
    names = registry.models()
    if not names:
        return f"no registered model in MLflow at {registry.place}; mlenv register OUTPUT --name NAME makes one"
    lines = []
    for name in names:
        model = registry.model(name)
        aliases = ", ".join(f"{alias} {version}" for alias, version in sorted(model.aliases.items())) or "no alias"
        last = f"; {_move_text(model.moves[-1])}" if model.moves else ""
        lines.append(f"{name}: {aliases}{last}")
    return "\n".join(lines)


def model_text(model: RegisteredModel, versions: list[ModelVersion]) -> str:
    """All that is known of one registered model: its versions, the newest first, and its moves, the newest last."""
    lines = []
    for version in versions:
        created = datetime.fromtimestamp(version.created_ms / 1000, UTC)
        aliases = "".join(f" @{alias}" for alias in version.aliases)
        lines.append(
            f"version {version.version}{aliases}  {version.tags.get('name', '')}, {created:%Y-%m-%d %H:%M} UTC, run {version.run_id}"
        )
        figures = [f"{key.removeprefix('test/')} {value}" for key, value in version.tags.items() if key.rpartition("/")[2] in _FIGURES]
        lines += [f"  {', '.join(figures)}"] if figures else []
        lines += [f"  {key}: {version.tags[key]}" for key in (*_WINDOWS, *_ORIGINS) if key in version.tags]
    lines += ["moves" if model.moves else "no moves yet", *(f"  {_move_text(move)}" for move in model.moves)]
    return "\n".join(lines)


def _move_text(move: Move) -> str:
    instead = f" instead of version {move.before}" if move.before and move.kind != "held" else ""
    text = f"{move.number}. {move.when} version {move.version} {move.kind}{instead} by {move.who}"
    text += f": {move.why}" if move.why else ""
    return text + ("" if move.is_done else " (not finished: the aliases may not have moved)")
