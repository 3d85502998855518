"""The live page without a browser: its files, its policy, and the numbers that it shows."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from importlib.resources import files
from typing import Any

import pytest
from tests.support.http_client import HttpClient

from els_service.server.web.page_routes import PageRoutes
from els_service.server.web.status_report import StatusReport

PAGE = files("els_service.server.web").joinpath("page")
SVG = "http://www.w3.org/2000/svg"


def paths_of(mode: str) -> list[str]:
    def check(_: object) -> Awaitable[None]:
        raise AssertionError

    return [route.path for route in PageRoutes(mode, StatusReport(tuple), check).routes()]


def test_the_page_and_its_files_come_with_a_policy_that_allows_no_other_source(
    http: HttpClient,
) -> None:
    page = http.get("/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    linked = re.findall(r'(?:href|src)="(/[^"]+)"', page.body.decode())
    assert len(linked) >= 3
    for path in linked:
        file = http.get(path)
        assert file.status == 200
        assert http.get(path, If_None_Match=file.headers["etag"]).status == 304


@pytest.mark.parametrize("file", [*PAGE.iterdir()], ids=lambda file: file.name)
def test_no_file_of_the_page_is_large_or_names_another_host(file: Any) -> None:
    text = file.read_text()
    assert len(text) < 16_000
    assert "//" not in re.sub(rf"{SVG}|^\s*//.*$", "", text, flags=re.MULTILINE)
    assert not re.search(r"\sstyle=|\son\w+=|innerHTML", text)


def test_the_setting_decides_whether_there_is_a_page() -> None:
    assert paths_of("off") == ["/v1/status"]
    assert {"/", "/v1/status", "/page/main.js"} <= set(paths_of("read"))


def test_the_status_counts_batches_and_latency_of_each_model(http: HttpClient) -> None:
    def found() -> Any:
        return http.get("/v1/status").json

    assert found()["page"] == "read"
    assert http.post("/v1/models/zeros:sample?steps=3&count=2").status == 200
    # A report answers for half a second.
    for _ in range(10_000):
        report = found()
        model = report["models"].get("zeros", {})
        if model.get("images", 0) >= 6 and model["ok"]:
            break
    assert model["batches"] >= 3
    assert model["latency"]["+Inf"] == model["ok"]
    assert report["server"]["serving"] == 1
    assert report["server"]["memory_in_flight_limit_bytes"] > 0
