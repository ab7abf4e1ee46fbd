"""The pages of the catalogue: as text, over a real server, and in a real browser."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import uvicorn
from playwright.sync_api import Page, sync_playwright

from mlenv.catalogue.feature_catalogue import Catalogue, CatalogueReader, Run
from mlenv.catalogue.feature_pages import link, make_app, render_feature, render_list, serve
from mlenv.catalogue.feature_record import FeatureDay, FeatureRecord
from mlenv.config import ChecksConfig
from mlenv.errors import MlenvError
from mlenv.models.registry import ModelVersion
from mlenv.schema import Categorical, Label, Numeric, Schema, Table

BROWSER_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
NASTY = "<script>alert('x')</script>/&\"?#"

SCHEMA = Schema(
    features={
        "price": Numeric(entity="item", owner="pricing"),
        "city": Categorical(entity="user", storage="string", core=True),
        NASTY: Numeric(owner="<i>us</i>"),
    },
    tables={"city": Table(num_embeddings=10, embedding_dim=4, ids="hash")},
    labels={"click": Label()},
)


def day(coverage: float) -> FeatureDay:
    return FeatureDay(
        rows=1000, coverage=coverage, mean=2.5, distinct=None, drift=0.02, drift_by_chance=0.05, label_rates={"click": 0.1, "buy": None}
    )


def run(number: int, coverages: dict[str, float] | None) -> Run:
    """A run of these days; city has the given coverage on them, all else is always there."""
    record = None
    if coverages is not None:
        features = {name: {date: day(share if name == "city" else 1.0) for date, share in coverages.items()} for name in SCHEMA.features}
        record = FeatureRecord(rows_per_request=1.0, features=features)
    return Run(
        run_id=f"{number:032x}",
        name=f"run {number}",
        started_ms=number * 60_000,
        data_sets=("logs/<ads>",),
        schema=SCHEMA,
        checks=ChecksConfig(),
        record=record,
    )


@pytest.fixture
def catalogue() -> Catalogue:
    first, second, old = run(2, {"2026-01-01": 0.9, "2026-01-02": 0.92}), run(3, {"2026-01-02": 0.91, "2026-01-03": 0.75}), run(1, None)
    version = ModelVersion(name="ranker", version="1", aliases=("champion",), run_id=first.run_id)
    return Catalogue(store="sqlite:///runs.db", runs=[second, first, old], versions=[version])


@pytest.fixture
def serve_pages() -> Iterator[Callable[[Callable[[], Catalogue]], str]]:
    """Serves the pages on a free port of this machine and says where."""
    running: list[tuple[uvicorn.Server, threading.Thread, socket.socket]] = []

    def start(read: Callable[[], Catalogue]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(read), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread, listener))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread, listener in running:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture
def page() -> Iterator[Page]:
    chromium = shutil.which("chromium")
    if chromium is None:
        reason = "no chromium here: apt-get install --no-install-recommends chromium"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=BROWSER_FLAGS)
        yield browser.new_page(viewport={"width": 400, "height": 800})
        browser.close()


def answer(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urlopen(Request(url, headers=headers), timeout=10) as found:
            return found.status, found.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def test_a_reader_searches_the_list_and_opens_a_feature(
    page: Page, catalogue: Catalogue, serve_pages: Callable[[Callable[[], Catalogue]], str]
) -> None:
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("http://127.0.0.1", "data:")) else complaints.append(request.url))
    page.goto(serve_pages(lambda: catalogue))

    def shown() -> list[str]:
        return [row.inner_text() for row in page.locator(".features tbody tr:visible a").all()]

    assert shown() == [NASTY, "city", "price"]
    page.get_by_role("searchbox").type("PRIC")
    assert shown() == ["price"]
    assert page.locator("#count").inner_text() == "1 of 3"
    page.get_by_role("searchbox").fill("")
    page.get_by_label("Entity").select_option("user")
    assert shown() == ["city"]
    page.get_by_label("Owner").select_option("pricing")
    assert shown() == []
    assert page.get_by_text("No feature is like that.").is_visible()
    page.get_by_label("Owner").select_option("")
    page.locator(".features").get_by_role("link", name="city").click()

    assert page.get_by_role("heading", level=1).inner_text() == "city"
    assert page.get_by_role("img", name="Coverage by day").locator("circle").count() == 3
    rows = [[cell.strip() for cell in row.inner_text().split("\t")][:3] for row in page.locator(".scroll tbody tr").all()]
    assert rows == [["2026-01-03", "1,000", "75.00%"], ["2026-01-02", "1,000", "91.00%"], ["2026-01-01", "1,000", "90.00%"]]
    assert page.get_by_text("ranker version 1 (@champion)").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 400  # nothing sticks out on a phone
    page.get_by_role("link", name="All features").click()
    page.get_by_role("link", name=NASTY).click()
    assert page.get_by_role("heading", level=1).inner_text() == NASTY
    assert complaints == []


def test_the_server_says_what_is_wrong_and_answers_to_its_own_name_alone(
    catalogue: Catalogue, serve_pages: Callable[[Callable[[], Catalogue]], str]
) -> None:
    place = serve_pages(lambda: catalogue)
    status, text = answer(f"{place}/features/ctiy")
    assert status == 404
    assert "did you mean &#39;city&#39;" in text
    assert answer(place, Host="evil.example")[0] == 400

    def away() -> Catalogue:
        raise MlenvError("MLflow at http://<b>: does not answer.")

    status, text = answer(serve_pages(away))
    assert status == 503
    assert "MLflow at http://&lt;b&gt;: does not answer." in text


def test_pages_escape_what_others_wrote(catalogue: Catalogue) -> None:
    for text in (render_list(catalogue), render_feature(catalogue, NASTY)):
        assert "alert('x')" not in text
        assert "<i>us" not in text
        assert "&lt;i&gt;us" in text
    assert "logs/&lt;ads&gt;" in render_feature(catalogue, NASTY)
    assert link(NASTY) in render_list(catalogue)


def test_pages_without_runs_and_without_records(catalogue: Catalogue) -> None:
    empty = Catalogue(store="here", runs=[], versions=[])
    assert "No run here has recorded features." in render_list(empty)
    old = replace(catalogue, runs=[catalogue.runs[-1]], versions=[])
    assert "No run has recorded its days." in render_feature(old, "price")
    assert "no registered model version" in render_list(old)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(MlenvError, match=r"port \d+ of 127\.0\.0\.1: .*--port"):
        serve(CatalogueReader("http://127.0.0.1:9"), taken.getsockname()[1])
