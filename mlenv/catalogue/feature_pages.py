"""The feature catalogue as pages of a small server, for this machine alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import quote

from mlenv.catalogue.feature_alerts import Alert, find_alerts
from mlenv.catalogue.feature_catalogue import Catalogue, CataloguedFeature, CatalogueReader
from mlenv.catalogue.feature_text import DAY_HEADER, NO_DAY, alert_row, day_rows, facts_of, list_row, started
from mlenv.errors import DataError, MlenvError
from mlenv.pages.charts import Chart, Range, Series, line_chart
from mlenv.pages.page import Cell, Table, render

if TYPE_CHECKING:
    from fastapi import FastAPI

_HOST = "127.0.0.1"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""The pages load nothing from anywhere."""


def serve(reader: CatalogueReader, port: int) -> None:
    """Shows the pages until it is interrupted.

    Raises:
        MlenvError: the port is taken.
    """
    import socket

    import uvicorn

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise MlenvError(f"port {port} of {_HOST}: {error}. Fix: choose another one with --port.") from error
    with listener, suppress(KeyboardInterrupt):  # the usual way to end it
        uvicorn.Server(uvicorn.Config(make_app(reader.read), log_level="warning")).run(sockets=[listener])


def make_app(read: Callable[[], Catalogue]) -> FastAPI:
    """The pages; the catalogue is read anew for each of them."""
    from fastapi import FastAPI
    from fastapi.responses import HTMLResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # A page elsewhere cannot read the catalogue by giving this address a name of its own.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"])

    def answer(page: Callable[[Catalogue], str]) -> HTMLResponse:
        status = 200
        try:
            text = page(read())
        except MlenvError as error:
            status = 404 if isinstance(error, DataError) else 503
            text = render("catalogue/features.html.j2", title="Nothing to show", message=str(error))
        return HTMLResponse(text, status, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"})

    @app.get("/")
    def features() -> HTMLResponse:
        return answer(render_list)

    @app.get("/features/{name:path}")
    def feature(name: str) -> HTMLResponse:
        return answer(lambda catalogue: render_feature(catalogue, name))

    return app


def render_list(catalogue: Catalogue) -> str:
    """All features, to be searched and filtered in the page."""
    features = catalogue.features.values()
    alerts = find_alerts(catalogue)
    choices = {
        "entity": sorted({one.definition.entity for one in features}),
        "owner": sorted({one.definition.owner or "-" for one in features}),
        "kind": sorted({one.kind for one in features}),
    }
    return render(
        "catalogue/features.html.j2",
        title="Features",
        message="",
        catalogue=catalogue,
        choices=choices,
        rows=[(one, link(one.name), list_row(one)) for one in features],
        alerts=[(alert, link(alert.feature), alert_row(alert)) for alert in alerts.raised],
        notes=alerts.notes,
    )


def render_feature(catalogue: Catalogue, name: str) -> str:
    """One feature.

    Raises:
        DataError: no run has it.
    """
    feature = catalogue.feature(name)
    alerts = [alert for alert in find_alerts(catalogue, every_version=True).raised if alert.feature == name]
    return render(
        "catalogue/feature.html.j2",
        feature=feature,
        facts=facts_of(feature),
        charts_of_days=_charts(feature, alerts) if feature.days else [],
        days=Table(DAY_HEADER, 1, [[Cell(text) for text in row] for row in reversed(day_rows(feature))]),
        runs=[(run, started(run)) for run in feature.runs],
        names={run.run_id: str(run) for run in feature.runs},
        alerts=[(alert, "", alert_row(alert)) for alert in alerts],
    )


def link(name: str) -> str:
    """Where the page of a feature is."""
    return f"/features/{quote(name, safe='')}"


def _charts(feature: CataloguedFeature, alerts: list[Alert]) -> list[Chart]:
    days, entries = [day or NO_DAY for day in feature.days], [entry for entry, _ in feature.days.values()]

    def series(name: str, values: Iterable[float | None], color: int) -> Series:
        return Series(name, [(place, math.nan if value is None else value) for place, value in enumerate(values)], color, "dots")

    def chart(title: str, lines: Sequence[Series], *, from_zero: bool = False, y_range: Range | None = None) -> Chart:
        return line_chart(title, lines, "", x_names=days, from_zero=from_zero, y_range=y_range)

    lowest = min(entry.coverage for entry in entries)
    trained = [Series(f"trained: {alert.version.name} {alert.version.version}", [(0, alert.before)], 4, "level") for alert in alerts[:3]]
    coverage = series("coverage", [entry.coverage for entry in entries], 0)
    charts = [chart("Coverage by day", [coverage, *trained], y_range=_shares(lowest))]
    if any(entry.drift is not None for entry in entries):
        chance = replace(series("by chance", [entry.drift_by_chance for entry in entries], 5), style="line")
        drift = series("against the other days", [entry.drift for entry in entries], 1)
        charts.append(chart("Drift by day (population stability index)", [drift, chance], from_zero=True))
    if any(entry.mean is not None for entry in entries):
        charts.append(chart("Mean by day", [series("mean", [entry.mean for entry in entries], 2)]))
    elif any(entry.distinct is not None for entry in entries):
        charts.append(chart("Different ids by day", [series("ids", [entry.distinct for entry in entries], 2)], from_zero=True))
    tasks = entries[-1].label_rates
    rates = [series(task, [entry.label_rates.get(task) for entry in entries], color) for color, task in enumerate(tasks)]
    return [*charts, chart("Label rates by day, where the feature is there", rates, from_zero=True)]


def _shares(lowest: float) -> tuple[float, float]:
    """An axis of shares up to 1, from a round number below the lowest."""
    return (0.0 if lowest < 0.5 else 0.5 if lowest < 0.88 else 0.85, 1.005)
