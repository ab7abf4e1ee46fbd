"""The feature catalogue as the command line prints it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from mlenv.catalogue.feature_alerts import Alert, Alerts
from mlenv.catalogue.feature_catalogue import Catalogue, CataloguedFeature, Run, is_drift
from mlenv.catalogue.feature_record import FeatureDay

LIST_HEADER = ("feature", "entity", "owner", "kind", "storage", "coverage", "worst day's drift", "data sets", "runs", "models")
DAY_HEADER = ("day", "rows", "coverage", "mean or distinct", "drift", "run")
ALERT_HEADER = ("", "model", "feature", "owner", "day", "before", "now")
NO_DAY = "no day"
"""Stands for rows without a day."""


def list_text(catalogue: Catalogue, chosen: Sequence[CataloguedFeature]) -> str:
    """A line for each of the chosen features."""
    others = f"; {catalogue.num_others} other runs say nothing of features" if catalogue.num_others else ""
    total = f"{len(chosen)} of {len(catalogue.features)} features, {len(catalogue.runs)} runs of {catalogue.store}{others}"
    return "\n".join([*([columns([LIST_HEADER, *map(list_row, chosen)], num_names=5)] if chosen else []), total])


def list_row(feature: CataloguedFeature) -> tuple[str, ...]:
    """Texts under ``LIST_HEADER``."""
    definition, newest, worst = feature.definition, feature.newest, feature.worst
    numbers = (len(feature.data_sets), len(feature.runs), len(feature.versions))
    return (
        feature.name,
        definition.entity,
        definition.owner or "-",
        feature.kind + (" (core)" if definition.core else ""),
        feature.storage or "-",
        f"{newest[1].coverage:.2%}" if newest else "-",
        f"{drift_text(worst[1])} on {worst[0] or NO_DAY}" if worst else "-",
        *map(str, numbers),
    )


def show_text(feature: CataloguedFeature) -> str:
    """All that is known of a feature."""
    facts = facts_of(feature)
    width = max(map(len, facts))
    lines = [feature.name, *(f"  {name.ljust(width)}  {value}" for name, value in facts.items())]
    lines += ["", "The definition differs between runs:", *(f"  {line}" for line in feature.differences)] if feature.differences else []
    lines += ["", "By day, as the newest run recorded it:" if feature.days else "No run has recorded its days: train again."]
    lines += [columns([DAY_HEADER, *day_rows(feature)], num_names=1)] if feature.days else []
    return "\n".join([*lines, "", usage_text(feature)])


def facts_of(feature: CataloguedFeature) -> dict[str, str]:
    """What the newest run says of it, as names and texts."""
    definition, newest, worst = feature.definition, feature.newest, feature.worst
    return {
        "entity": definition.entity,
        "owner": definition.owner or "-",
        "kind": feature.kind,
        "storage": feature.storage or "-",
        "table": feature.table or "-",
        "core": "yes" if definition.core else "no",
        "latest coverage": f"{newest[1].coverage:.2%} on {newest[0] or NO_DAY}" if newest else "-",
        "worst day's drift": f"{drift_text(worst[1])} on {worst[0] or NO_DAY}" if worst else "-",
        "used by": f"data sets: {len(feature.data_sets)}, runs: {len(feature.runs)}, model versions: {len(feature.versions)}",
    }


def day_rows(feature: CataloguedFeature) -> list[tuple[str, ...]]:
    """Texts under ``DAY_HEADER``."""
    return [
        (day or NO_DAY, f"{entry.rows:,}", f"{entry.coverage:.2%}", _middle(entry), drift_text(entry), str(run))
        for day, (entry, run) in feature.days.items()
    ]


def usage_text(feature: CataloguedFeature) -> str:
    """Who uses a feature."""
    lines = [f"data sets ({len(feature.data_sets)})", *(f"  {path}" for path in feature.data_sets)]
    lines += [f"runs ({len(feature.runs)})", *(f"  {started(run)}  {run.run_id}  {run.name}" for run in feature.runs)]
    names = {run.run_id: str(run) for run in feature.runs}
    versions = [f"  {version}, made from run {names[version.run_id]}" for version in feature.versions]
    return "\n".join([*lines, f"registered model versions ({len(versions)})", *versions])


def alerts_text(alerts: Alerts) -> str:
    """A line for each alert, then what could not be compared."""
    rows = [ALERT_HEADER, *map(alert_row, alerts.raised)]
    lines = [columns(rows, num_names=5)] if alerts.raised else []
    lines += [f"not compared: {note}" for note in alerts.notes]
    failures = sum(alert.finding.severity == "fail" for alert in alerts.raised)
    total = f"{failures} failures, {len(alerts.raised) - failures} warnings among {alerts.num_compared} features of registered models"
    return "\n".join([*lines, total])


def alert_row(alert: Alert) -> tuple[str, ...]:
    """Texts under ``ALERT_HEADER``."""
    return (
        alert.finding.severity.upper(),
        str(alert.version),
        alert.feature,
        alert.owner or "-",
        f"{alert.day or NO_DAY}, {alert.where}",
        f"{alert.before:.2%}",
        f"{alert.now:.2%}",
    )


def started(run: Run) -> str:
    """When a run began, in UTC."""
    return f"{datetime.datetime.fromtimestamp(run.started_ms / 1000, datetime.UTC):%Y-%m-%d %H:%M}"


def drift_text(day: FeatureDay) -> str:
    """A population stability index, and whether chance alone may bring it about."""
    if day.drift is None:
        return "-"
    return f"{day.drift:.3f}" if is_drift(day) else f"{day.drift:.3f} (chance)"


def columns(rows: Sequence[Sequence[str]], *, num_names: int) -> str:
    """A table of texts: the first columns name the row and stand left, figures stand right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = (
        [text.ljust(width) if place < num_names else text.rjust(width) for place, (text, width) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _middle(day: FeatureDay) -> str:
    if day.mean is not None:
        return f"{day.mean:.4g}"
    return "-" if day.distinct is None else f"{day.distinct:,}"
