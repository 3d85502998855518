"""HTTP of ``/metrics``, ``/healthz`` and ``/readyz`` over real sockets, honest and hostile."""

from __future__ import annotations

import gzip
import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from els_service.server.telemetry import metrics_http
from els_service.server.telemetry.metrics import Metrics
from els_service.server.telemetry.metrics_http import HttpPages, accepts_gzip, format_of

TIMEOUT_S = 10.0
TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


class Pages:
    """Pages of many series, and the reason that ``/readyz`` gives."""

    def __init__(self) -> None:
        self.metrics, self.reason = Metrics(), ""
        method = self.metrics.method("unary", "s", "M")
        for number in range(20):
            method.end(f"m{number}", "OK", 0.02)
        self.http = HttpPages(self.metrics.registry, lambda: self.reason, "127.0.0.1", 0)

    def ask(
        self, path: str, method: str = "GET", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body, on a connection of its own."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.http.port, TIMEOUT_S)) as one:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            one.request(method, path, headers=names)
            answer = one.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    def connect(self, sent: bytes = b"") -> socket.socket:
        """Return a connection on which ``sent`` was written."""
        one = socket.create_connection(("127.0.0.1", self.http.port), TIMEOUT_S)
        one.sendall(sent)
        return one


@pytest.fixture(scope="module")
def pages() -> Iterator[Pages]:
    pages = Pages()
    yield pages
    pages.http.close()


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        ("text/html,*/*;q=0.8", TEXT),
        (PROMETHEUS_2, OPENMETRICS),
        (PROMETHEUS_3, OPENMETRICS),
        ("application/openmetrics-text", OPENMETRICS),
        ('application/openmetrics-text; version="1.0.0"', OPENMETRICS),
        ("application/openmetrics-text;q=0.2,text/plain;version=0.0.4;q=0.7", TEXT),
        ("application/openmetrics-text;version=1.0.0;q=0", TEXT),
        # Formats and versions that are not written, though the library would promise some.
        ("application/openmetrics-text;version=2.0.0", TEXT),
        ("application/openmetrics-text;version=0.0.1", TEXT),
        ("application/openmetrics-text;version=9999", TEXT),
        ("application/openmetrics-text;version=soon", TEXT),
        ("text/plain;version=1.0.0;escaping=nothing-known", TEXT),
        ("text/plain;version=x.y", TEXT),
        ("application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily", TEXT),
        ("application/openmetrics-text;q=nan", TEXT),
        (";;;,,=;q=;\x7f\xff", TEXT),
    ],
)
def test_an_accept_header_chooses_between_the_two_formats_and_never_fails(
    pages: Pages, accept: str, content_type: str
) -> None:
    status, headers, body = pages.ask("/metrics", Accept=accept)
    assert (status, headers["content-type"]) == (200, content_type)
    assert b"els_build_info" in body
    assert body.endswith(b"# EOF\n") == (content_type == OPENMETRICS)
    if content_type == OPENMETRICS:
        # Its parser has no types.
        assert list(parse_openmetrics(body.decode()))  # type: ignore[no-untyped-call]


@given(st.text(alphabet=st.characters(max_codepoint=255)))
def test_garbage_is_a_header_like_any_other(header: str) -> None:
    assert format_of(header) in ("text/plain", "application/openmetrics-text")
    assert accepts_gzip(header) in (True, False)


@pytest.mark.parametrize(
    ("accepted", "compressed"),
    [("gzip", True), ("br, GZIP;q=0.5", True), ("gzip;q=0", False), ("identity", False)],
)
def test_a_page_is_compressed_if_the_client_accepts_gzip(
    pages: Pages, accepted: str, compressed: bool
) -> None:
    _, headers, body = pages.ask("/metrics", Accept_Encoding=accepted)
    assert (headers.get("content-encoding") == "gzip") == compressed
    assert b"els_build_info" in (gzip.decompress(body) if compressed else body)


def test_a_scraper_may_ask_for_some_names_alone(pages: Pages) -> None:
    names = {"process_open_fds", "els_request_seconds_sum"}
    _, _, body = pages.ask("/metrics?" + "&".join(f"name[]={name}" for name in names))
    assert set(re.findall(r"^\w+", body.decode(), re.MULTILINE)) == names
    assert pages.ask("/metrics?" + "&".join(["name[]=x"] * 200))[0] == 400


def test_readiness_is_200_or_503_with_the_reason_and_the_process_is_alive(pages: Pages) -> None:
    assert pages.ask("/readyz")[::2] == (200, b"ok\n")
    pages.reason = "models are being loaded"
    try:
        assert pages.ask("/readyz")[::2] == (503, b"not ready: models are being loaded\n")
        assert pages.ask("/healthz")[::2] == (200, b"ok\n")
    finally:
        pages.reason = ""


@pytest.mark.parametrize("path", ["/", "/metrics/", "/metric", "/favicon.ico", "/%6d", "//metrics"])
def test_any_other_path_is_not_found(pages: Pages, path: str) -> None:
    assert pages.ask(path)[0] == 404


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_any_other_method_is_not_allowed(pages: Pages, path: str, method: str) -> None:
    status, headers, _ = pages.ask(path, method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_head_has_the_headers_and_no_body(pages: Pages) -> None:
    status, headers, body = pages.ask("/metrics", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 1000


def test_a_connection_serves_one_scrape_after_another(pages: Pages) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", pages.http.port, TIMEOUT_S)) as one:
        for path in ("/metrics", "/healthz", "/metrics"):
            one.request("GET", path)
            assert one.getresponse().read()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00" * 64,
        b"GET\r\n\r\n",
        b"GET /metrics FTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: " + b"x" * (64 << 10),
        b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nContent-Length: 8\r\n\r\n",
    ],
)
def test_malformed_http_is_a_400_and_ends_the_connection(pages: Pages, sent: bytes) -> None:
    with pages.connect(sent) as one:
        received = b""
        # Closed with bytes of ours unread, it may be reset.
        try:
            while data := one.recv(1 << 16):
                received += data
        except ConnectionResetError:
            pass
    assert received.startswith(b"HTTP/1.1 400") or (not received and len(sent) > 1 << 14)
    assert pages.ask("/healthz")[0] == 200


@pytest.mark.alone
def test_half_open_slow_and_deaf_peers_cost_no_thread_and_delay_no_scrape(pages: Pages) -> None:
    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
    body = b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    assert pages.ask("/metrics")[0] == 200
    threads, before = threading.active_count(), memory()
    with ExitStack() as stack:
        held = [
            stack.enter_context(pages.connect(sent))
            for sent in (b"", request, body, request + b"X-A: b\r\n")
            for _ in range(125)
        ]
        for _ in range(5):
            for one in held:
                try:
                    one.send(b"x")
                except OSError:
                    # Its place was taken.
                    continue
            began = time.monotonic()
            assert pages.ask("/metrics")[0] == 200
            assert pages.ask("/readyz")[0] == 200
            assert time.monotonic() - began < 1.0
        # Threads of other tests may end meanwhile.
        assert threading.active_count() <= threads
        assert memory() - before < 32 << 20


def test_a_request_that_is_not_whole_in_time_ends_its_connection(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_http, "_REQUEST_S", 0.05)
    for sent in (b"", b"GET /metrics HTTP/1.1\r\n", b"POST /x HTTP/1.1\r\nContent-Length: 9\r\n"):
        with pages.connect(sent) as one:
            # By a reset, as it may have been sent more than it has read.
            assert ended(partial(one.recv, 1))


def ended(receive: Callable[[], bytes]) -> bool:
    """Return whether the other end closed or reset the connection."""
    try:
        return receive() == b""
    except ConnectionResetError:
        return True


def test_a_new_connection_takes_the_place_of_the_one_that_waited_longest(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_http, "_CONNECTIONS", 3)
    with ExitStack() as stack:
        held = [stack.enter_context(pages.connect()) for _ in range(3)]
        assert pages.ask("/healthz")[0] == 200
        assert ended(lambda: held[0].recv(1))
        held[2].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert held[2].recv(1 << 12).startswith(b"HTTP/1.1 200")


def test_scrapes_that_wait_share_a_page_that_is_made_after_they_came(pages: Pages) -> None:
    made, begun, go_on = [0], threading.Event(), threading.Event()

    def gauges() -> list[tuple[str, dict[str, str], float]]:
        made[0] += 1
        begun.set()
        assert go_on.wait(TIMEOUT_S)
        return [("els_trajectories", {}, made[0])]

    pages.metrics.gauges = gauges
    try:
        request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with ExitStack() as stack:
            first = stack.enter_context(pages.connect(request))
            assert begun.wait(TIMEOUT_S)
            later = [stack.enter_context(pages.connect(request)) for _ in range(20)]
            # While a page is made the others answer, and those before them have been read.
            assert pages.ask("/readyz")[0] == 200
            go_on.set()
            told = [page_of(one) for one in (first, *later)]
    finally:
        pages.metrics.gauges = tuple
    assert b"\nels_trajectories 1.0\n" in told[0]
    assert all(b"\nels_trajectories 2.0\n" in page for page in told[1:])
    assert made[0] == 2


def page_of(one: socket.socket) -> bytes:
    """Return all that comes until the connection ends."""
    return b"".join(iter(lambda: one.recv(1 << 16), b""))


def test_a_port_in_use_is_an_error_and_an_ended_one_is_free(pages: Pages) -> None:
    with pytest.raises(OSError, match="in use"):
        HttpPages(pages.metrics.registry, str, "127.0.0.1", pages.http.port)
    other = HttpPages(pages.metrics.registry, str, "localhost", 0)
    other.close()
    HttpPages(pages.metrics.registry, str, "localhost", other.port).close()
