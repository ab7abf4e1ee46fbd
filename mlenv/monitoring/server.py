"""Checks again and again, with the figures of the last check for Prometheus at ``/metrics``."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from mlenv.checks.findings import Severity
from mlenv.errors import MlenvError
from mlenv.monitoring.check import Checked

logger = logging.getLogger(__name__)

STATES: dict[Severity, int] = {"pass": 0, "warn": 1, "fail": 2}


class MonitorMetrics:
    """The gauges; a finding that the last check does not have any more is gone."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"mlenv_monitor_{name}", text, labels, registry=self.registry)

        self._value = gauge("value", "Figure of a check", "check", "subject")
        self._state = gauge("state", "0 pass, 1 warn, 2 fail", "check", "subject")
        self._verdict = gauge("verdict", "The worst state")
        self._rows = gauge("rows", "Rows that were checked")
        self._mean = gauge("mean_prediction", "Mean prediction", "task")
        self._checked = gauge("checked_timestamp_seconds", "When the last check ended well")
        self._errors = Counter("mlenv_monitor_errors", "Checks that could not be made", registry=self.registry)

    def update(self, checked: Checked) -> None:
        """Takes over what a check found."""
        self._value.clear()
        self._state.clear()
        for finding in checked.verdict.findings:
            self._value.labels(finding.check, finding.subject).set(finding.value)
            self._state.labels(finding.check, finding.subject).set(STATES[finding.severity])
        self._verdict.set(STATES[checked.verdict.severity])
        self._rows.set(checked.now.statistics.rows)
        for task, counts in checked.now.scores.items():
            self._mean.labels(task).set(counts.mean)
        self._checked.set(checked.at.timestamp())

    def fail(self) -> None:
        """Counts a check that could not be made; what the last one found stays."""
        self._errors.inc()


def serve_monitor(check: Callable[[], Checked], *, host: str, port: int, every_seconds: float, stop: threading.Event | None = None) -> None:
    """Checks until it is interrupted. A check that cannot be made is one warning, and the next one comes in its time.

    Raises:
        MlenvError: the address or the port is taken.
    """
    metrics, stop = MonitorMetrics(), stop or threading.Event()
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except (OSError, OverflowError) as error:
        raise MlenvError(f"port {port} of {host}: {error}. Fix: choose another one with --port.") from error
    logger.info("figures at http://%s:%d/metrics", host, server.server_port)
    with suppress(KeyboardInterrupt):  # the usual way to end it
        while not stop.is_set():
            try:
                metrics.update(check())
            except (MlenvError, OSError) as error:
                metrics.fail()
                logger.warning("not checked: %s", error)
            stop.wait(every_seconds)
    server.shutdown()
    server.server_close()
    thread.join()
