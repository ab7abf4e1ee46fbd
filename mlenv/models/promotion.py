"""A challenger asks to replace the champion: both are measured on the same rows, the gates judge, aliases move. And back again."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from mlenv.checks.findings import Verdict
from mlenv.checks.validation import check_baseline, validate_statistics, window_statistics
from mlenv.composition import from_plain, load
from mlenv.config import ExperimentConfig, GatesConfig
from mlenv.datasets.statistics import STATISTICS_FILE, Statistics, read_statistics
from mlenv.errors import ConfigError, DataError
from mlenv.inference.stored_scorer import HeldOut, StoredScorer, open_scorer
from mlenv.models.exported_costs import measure_exported
from mlenv.models.gates import (
    Figure,
    GateVerdict,
    Judgement,
    Loss,
    judge_calibration,
    judge_cost,
    judge_data,
    judge_gain,
    judge_limits,
    judge_missing,
    judge_regression,
    measure,
)
from mlenv.models.paired_scoring import Scored, check_row_key, measure_costs, missing_losses, pair, score
from mlenv.models.promotion_page import PromotionPage, render_promotion
from mlenv.models.registry import CHALLENGER, CHAMPION, PREVIOUS, ModelVersion, Move, MoveKind, Registry
from mlenv.pages.page import check_out, write_whole
from mlenv.records.mlflow_store import asking

logger = logging.getLogger(__name__)

PAGE: Final = "promotion.html"
VERDICT: Final = "promotion.json"
FOLDER: Final = "promotions"
"""Of the challenger's run, with one folder below it for each time that it asked."""
_REASONS: Final = 3
"""That the history gives of a version that is held; the report has all."""


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What came of asking."""

    challenger: ModelVersion
    champion: ModelVersion | None
    verdict: GateVerdict
    move: Move | None
    """None when nothing was to be moved or recorded."""
    report: str
    """Where MLflow keeps the page and the figures."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """All that was measured, and what the gates say of it."""

    verdict: GateVerdict
    figures: list[Figure]
    losses: list[Loss]
    num_rows: int
    num_requests: int
    rows: HeldOut
    """What the models were measured on."""


def promote(
    name: str,
    *,
    version: str = CHALLENGER,
    uri: str = "",
    gates: Path | None = None,
    data: ExperimentConfig | None = None,
    force: bool = False,
    reason: str = "",
    is_trial: bool = False,
    out: Path | None = None,
) -> Promotion:
    """Runs the gates on a version, and makes it champion when it passes all of them.

    Args:
        version: its number, or an alias of it.
        uri: see ``store_uri``.
        gates: YAML file with the keys of ``GatesConfig``; otherwise ``gates`` of the challenger's config.
        data: its test window is what both are measured on; otherwise that of the challenger's config.
        force: make it champion whatever the gates say; needs a reason.
        is_trial: judge and report, and neither move nor record anything.
        out: folder for the page and the figures, beside MLflow's; its parent exists.

    Raises:
        DataError, ConfigError, CheckpointError: there is no such version, it is champion already, its rows cannot be read or joined,
            or an alias was moved by somebody else meanwhile. The champion stays.
        MlenvError: MLflow does not answer. The champion stays.
    """
    if force and not reason:
        raise ConfigError("--reason", expected="a reason beside --force", received="", fix="say why the gates do not count this time")
    check_out(out)
    wanted = None if gates is None else read_gates(gates)
    registry = Registry(uri)
    aliases = registry.model(name).aliases
    challenger = registry.version(name, version)
    champion = registry.version(name, aliases[CHAMPION]) if CHAMPION in aliases else None
    if champion is not None and champion.version == challenger.version:
        raise DataError(f"{name} version {challenger.version}", expected="a version that is not champion yet", received="the champion")
    judged = _judge(registry, challenger, champion, wanted, data)
    kind: MoveKind = "promoted" if judged.verdict.is_passed else "forced" if force else "held"
    page = PromotionPage(
        title=name,
        facts=_facts(challenger, champion, judged, reason),
        decision="trial" if is_trial else kind,
        verdict=judged.verdict,
        figures=judged.figures,
        losses=judged.losses,
    )
    plain = {"challenger": str(challenger), "champion": champion and str(champion), **judged.verdict.to_plain()}
    documents = {PAGE: render_promotion(page), VERDICT: json.dumps(plain | {"decision": page.decision, "facts": page.facts}, indent=2)}
    if out is not None:
        out.mkdir(exist_ok=True)
        for file, text in documents.items():
            write_whole(text, out / file)
    if is_trial:
        return Promotion(challenger=challenger, champion=champion, verdict=judged.verdict, move=None, report="")
    report = _keep_report(registry, challenger, documents)
    before = champion.version if champion is not None else ""
    why = reason or _why(judged.verdict)
    if kind == "held":
        move = registry.record(name, kind, challenger.version, before=before, why=why, report=report)
    else:
        expected = {CHAMPION: before} | ({version: challenger.version} if version in aliases else {})
        moved = {CHAMPION: challenger.version} | ({PREVIOUS: before} if before else {})
        if aliases.get(CHALLENGER) == challenger.version:
            moved[CHALLENGER] = ""
        move = registry.move(name, kind, moved, expected=expected, why=why, report=report)
    return Promotion(challenger=challenger, champion=champion, verdict=judged.verdict, move=move, report=report)


def rollback(name: str, *, uri: str = "", reason: str = "") -> Move:
    """Makes the version champion again that was it before. What was champion before that one becomes the previous one.

    Raises:
        DataError: there is no such model or no previous champion, or an alias was moved meanwhile.
        MlenvError: MLflow does not answer.
    """
    registry = Registry(uri)
    model = registry.model(name)
    if PREVIOUS not in model.aliases or CHAMPION not in model.aliases:
        received = ", ".join(model.aliases) or "no alias"
        raise DataError(name, expected=f"the aliases {CHAMPION} and {PREVIOUS}", received=received, fix=f"mlenv models {name} shows them")
    back = model.aliases[PREVIOUS]
    there = {version.version for version in registry.versions(name)}
    earlier = model.champions[: model.champions.index(back)] if back in model.champions else []
    earlier = [version for version in earlier if version in there and version != back]
    expected = {alias: model.aliases[alias] for alias in (CHAMPION, PREVIOUS)}
    aliases = {CHAMPION: back, PREVIOUS: earlier[-1] if earlier else ""}
    return registry.move(name, "rolled back", aliases, expected=expected, why=reason)


def read_gates(file: Path) -> GatesConfig:
    """
    Raises:
        Problems, ConfigError: the file is no YAML, or has other keys than ``GatesConfig``.
    """
    gates: GatesConfig = from_plain(load(file), GatesConfig, str(file))
    return gates


def _judge(
    registry: Registry, challenger: ModelVersion, champion: ModelVersion | None, wanted: GatesConfig | None, data: ExperimentConfig | None
) -> Judged:
    versions = [one for one in (challenger, champion) if one is not None]
    scorers = [open_scorer(f"models:/{one.name}/{one.version}", registry.uri, str(one)) for one in versions]
    first, second = scorers[0], scorers[1] if champion is not None else None
    check_row_key(first.schema, str(challenger))
    gates, rows = wanted or first.sections.gates, _held_out(first, challenger, data)
    baseline = _training_statistics(registry, challenger) if gates.data_checks else None
    scored: list[Scored] = []
    with ExitStack() as opened:
        sources = [scorer.source(rows, first.schema) for scorer in scorers]  # both are found readable before the long work
        for source in sources:
            opened.callback(source.close)
        exported = measure_exported(versions, scorers, registry.uri, rows, gates.export) if gates.export is not None else None
        for one, scorer, source in zip(versions, scorers, sources, strict=True):
            logger.info("scoring %s rows of %s with %s", f"{source.num_stored_rows:,}", rows.path, one)
            scored.append(score(scorer, source, gates))
    other = scored[1] if second is not None else None
    paired = pair(scored[0], other, first.schema, second.schema.tasks if second is not None else (), gates.common_rows)
    figures = measure(paired, gates)
    costs = (exported and exported.costs) or measure_costs(scorers, scored)
    losses = missing_losses(scored[0], other)
    judgements = [*judge_limits(scored[0].metrics, first.schema.tasks, gates), *judge_calibration(figures, gates)]
    if second is not None:
        judgements += [*judge_regression(figures, paired.lost_tasks, gates), *judge_gain(figures, gates)]
    if baseline is not None:
        judgements += judge_data(_data_verdict(first, rows, baseline, f"statistics of {challenger}"))
    judgements += exported.judgements if exported is not None else []
    judgements += [*judge_cost(costs[0], costs[1] if second is not None else None, gates), *judge_missing(losses, gates)]
    order: list[Judgement] = sorted(judgements, key=lambda one: one.is_passed)
    tasks = paired.tasks.values()
    return Judged(
        verdict=GateVerdict(judgements=order),
        figures=figures,
        losses=losses,
        num_rows=max(len(task.labels) for task in tasks),
        num_requests=max(task.num_requests for task in tasks),
        rows=rows,
    )


def _held_out(challenger: StoredScorer, version: ModelVersion, data: ExperimentConfig | None) -> HeldOut:
    config = challenger.sections.data if data is None else data.data
    if config.test is None:
        place = f"{version}, data.test" if data is None else "--data: data.test"
        raise ConfigError(place, expected="a window to compare on", received=None, fix="name a config with one: --data CONFIG")
    return HeldOut(path=config.path, window=config.test)


def _training_statistics(registry: Registry, version: ModelVersion) -> Statistics:
    what, fix = "a version of a run with statistics", "mlenv register makes one"
    with asking(registry.uri, f"{version}, {STATISTICS_FILE}", what=what, fix=fix), tempfile.TemporaryDirectory() as folder:
        return read_statistics(Path(registry.client.download_artifacts(version.run_id, STATISTICS_FILE, folder)))


def _data_verdict(scorer: StoredScorer, rows: HeldOut, baseline: Statistics, place: str) -> Verdict:
    with closing(scorer.source(rows)) as source:
        window = window_statistics(source)
    check_baseline(baseline, window, place)
    return validate_statistics(window, baseline, scorer.schema, scorer.sections.checks, rows.window)


def _keep_report(registry: Registry, version: ModelVersion, documents: dict[str, str]) -> str:
    """Puts the report into the challenger's run, before anything moves."""
    folder = f"{FOLDER}/{version.name}-{version.version}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    with asking(registry.uri, f"run {version.run_id}", what="the run of the challenger"), _written(documents) as files:
        for file in files:
            registry.client.log_artifact(version.run_id, str(file), folder)
    return f"runs:/{version.run_id}/{folder}"


@contextmanager
def _written(documents: dict[str, str]) -> Iterator[list[Path]]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in documents]
        for file, text in zip(files, documents.values(), strict=True):
            file.write_text(text, encoding="utf-8")
        yield files


def _facts(challenger: ModelVersion, champion: ModelVersion | None, judged: Judged, reason: str) -> dict[str, str]:
    facts: dict[str, Any] = {
        "challenger": str(challenger),
        "champion": str(champion) if champion is not None else "none: the first version is judged by itself",
        "rows": f"{judged.rows.path}, {judged.rows.window}",
        "compared": f"{judged.num_rows:,} rows of {judged.num_requests:,} requests",
        "asked": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    return facts | ({"reason": reason} if reason else {})


def _why(verdict: GateVerdict) -> str:
    if verdict.is_passed:
        return "passed all gates"
    reasons = [f"{one.gate} of {one.subject}: {one.detail}" for one in verdict.failures]
    more = [f"{len(reasons) - _REASONS} more"] if len(reasons) > _REASONS else []
    return "; ".join([*reasons[:_REASONS], *more])
