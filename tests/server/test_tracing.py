"""Spans as a collector gets them: a real server, a real OTLP sink, and batches told directly."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import Queue
from typing import Any
from urllib.request import Request, urlopen

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Span, SpanKind
from pydantic import ValidationError
from tests.support.bad_requests import denoise, tensor
from tests.support.models_folder import SHAPE, write_models
from tests.support.proxies import proxying

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_service.config import Settings
from els_service.engine.request_context import BatchRecord
from els_service.logs import CALL
from els_service.server.requests.denoise import DenoiseMethod
from els_service.server.server import Server
from els_service.server.telemetry.tracing import Tracing

METHOD = "denoise.v1.DenoiserService/Denoise"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=1"))
UNSAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)
TIMEOUT_S = 20


class Memory:
    """Spans that end up in memory."""

    def __init__(self, ratio: float) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing("unused", ratio, exporter=self._exporter)

    def call(self, metadata: Any = ()) -> Span:
        span = self.tracing.begin(METHOD, metadata)
        assert span is not None
        return span

    def ended(self) -> list[ReadableSpan]:
        self.tracing.close()
        return list(self._exporter.get_finished_spans())


SpansAt = Callable[[float], Memory]


@pytest.fixture
def spans_at() -> Iterator[SpansAt]:
    """Yield what makes spans at a ratio."""
    with ExitStack() as stack:

        def make(ratio: float) -> Memory:
            memory = Memory(ratio)
            stack.callback(memory.tracing.close)
            return memory

        yield make


def launch(*members: object, queued_ns: tuple[int, ...] = ()) -> BatchRecord:
    """Return a batch of 8 images, computed from 2 to 3 s."""
    queued = queued_ns or tuple(10**9 for _ in members)
    return BatchRecord("m", "cpu", 2 * 10**9, 3 * 10**9, 8, 0.5, members, queued)


def test_a_call_continues_its_caller_s_trace(spans_at: SpansAt) -> None:
    memory = spans_at(0)
    span = memory.call(SAMPLED)
    assert memory.tracing.trace_id(span) == TRACE
    memory.tracing.end(span, "OK", "m")
    (ended,) = memory.ended()
    assert ended.parent is not None
    assert f"{ended.parent.span_id:016x}" == PARENT
    assert ended.parent.trace_state == {"vendor": "1"}
    assert (ended.name, ended.kind) == (METHOD, SpanKind.SERVER)
    assert ended.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": METHOD,
        "rpc.response.status_code": "OK",
        "els.model": "m",
    }
    assert ended.status.is_unset
    assert ended.resource.attributes["service.name"] == "els-denoise"


@pytest.mark.parametrize(
    ("code", "fault"),
    [("INTERNAL", True), ("UNAVAILABLE", True), ("CANCELLED", False), ("NOT_FOUND", False)],
)
def test_only_the_server_s_faults_are_errors_of_its_span(
    spans_at: SpansAt, code: str, fault: bool
) -> None:
    memory = spans_at(1)
    memory.tracing.end(memory.call(), code, "")
    (ended,) = memory.ended()
    assert ended.status.is_ok is not fault
    assert ended.status.is_unset is not fault


def test_the_caller_s_decision_outranks_the_ratio(spans_at: SpansAt) -> None:
    memory = spans_at(1)
    assert memory.tracing.begin(METHOD, UNSAMPLED) is None
    assert spans_at(0).tracing.begin(METHOD, SAMPLED) is not None


@pytest.mark.parametrize("header", ["", "00-xyz", f"00-{'0' * 32}-{PARENT}-01", "\xff" * 500])
def test_a_broken_traceparent_counts_as_none(spans_at: SpansAt, header: str) -> None:
    assert spans_at(0).tracing.begin(METHOD, [("traceparent", header)]) is None
    assert spans_at(1).tracing.begin(METHOD, [("traceparent", header)]) is not None


def test_the_ratio_is_the_share_of_traced_calls(spans_at: SpansAt) -> None:
    tracing = spans_at(0.25).tracing
    traced = sum(tracing.begin(METHOD, ()) is not None for _ in range(4000))
    # Six standard deviations.
    assert abs(traced - 1000) < 165


def test_a_batch_links_to_all_its_members_and_their_spans_to_the_batch(spans_at: SpansAt) -> None:
    memory = spans_at(1)
    first, second = memory.call(), memory.call(SAMPLED)
    memory.tracing.on_batch(
        # The first call has two items in it, and one belongs to a call that is not traced.
        launch(first, None, second, first, queued_ns=(10**9, 1, 15 * 10**8, 11 * 10**8))
    )
    spans = memory.ended()
    (batch,) = (span for span in spans if span.name == "batch")
    assert batch.parent is None
    assert [link.context for link in batch.links] == [
        first.get_span_context(),
        second.get_span_context(),
    ]
    assert (batch.start_time, batch.end_time) == (2 * 10**9, 3 * 10**9)
    assert batch.attributes == {
        "els.model": "m",
        "els.device": "cpu",
        "els.images": 8,
        "els.cost_seconds": 0.5,
    }
    queues = [span for span in spans if span.name == "queue"]
    computes = [span for span in spans if span.name == "compute"]
    parents = [call.get_span_context() for call in (first, second, first)]
    assert [span.parent for span in queues] == [span.parent for span in computes] == parents
    assert [span.start_time for span in queues] == [10**9, 15 * 10**8, 11 * 10**8]
    assert {span.end_time for span in queues} == {2 * 10**9}
    for span in computes:
        assert (span.start_time, span.end_time) == (2 * 10**9, 3 * 10**9)
        assert [link.context for link in span.links] == [batch.get_span_context()]


def test_a_batch_of_untraced_calls_makes_no_span(spans_at: SpansAt) -> None:
    memory = spans_at(1)
    memory.tracing.on_batch(launch(None, None))
    assert memory.ended() == []


class Sink(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: Queue[trace_pb2.Span] = Queue()

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put(span)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def sink() -> Iterator[tuple[Sink, int]]:
    """Yield a collector and its port."""
    collector, server = Sink(), grpc.server(ThreadPoolExecutor(2))
    # Generated without types.
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(  # type: ignore[no-untyped-call]
        collector, server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, port
    server.stop(None).wait()


@pytest.fixture
async def traced(sink: tuple[Sink, int], tmp_path: Path) -> AsyncIterator[Traced]:
    """Yield a server that traces every call into the sink."""
    settings = Settings(
        models=write_models(tmp_path / "models"),
        port=0,
        metrics_port=0,
        traces=f"http://127.0.0.1:{sink[1]}",
        traces_ratio=1,
        grace_s=0,
        threads=1,
    )
    server = Server(settings)
    ports = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc_port}") as channel:
        yield Traced(server, DenoiserServiceStub(channel), sink[0], ports.metrics_port)
    await server.close()


class Traced:
    """A server, a way to ask it, and where its spans go."""

    def __init__(self, server: Server, stub: Any, sink: Sink, metrics_port: int) -> None:
        self.server, self.stub, self._sink = server, stub, sink
        self._metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"

    def metrics(self) -> str:
        """Return the metrics in the format that has exemplars."""
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        with urlopen(Request(self._metrics_url, headers=accept), timeout=TIMEOUT_S) as page:
            return str(page.read(), "utf-8")

    async def spans(self) -> list[trace_pb2.Span]:
        """Close the server and return all spans."""
        await self.server.drain()
        await self.server.close()
        return [self._sink.spans.get_nowait() for _ in range(self._sink.spans.qsize())]

    async def calls(self) -> list[trace_pb2.Span]:
        """Close the server and return the spans of calls."""
        return [span for span in await self.spans() if span.kind == trace_pb2.Span.SPAN_KIND_SERVER]


def code_of(span: trace_pb2.Span) -> str:
    return next(
        item.value.string_value
        for item in span.attributes
        if item.key == "rpc.response.status_code"
    )


async def test_every_end_of_a_call_ends_its_span(traced: Traced) -> None:
    stub, sample = traced.stub, pb.SampleRequest(model="ideal", steps=3)
    before = time.time_ns()
    await stub.Denoise(denoise(), metadata=SAMPLED, timeout=TIMEOUT_S)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Denoise(denoise(model="nobody"), timeout=TIMEOUT_S)
    assert len([step async for step in stub.Sample(sample, timeout=TIMEOUT_S)]) == 3
    stream = stub.Sample(pb.SampleRequest(model="ideal", steps=1000), timeout=TIMEOUT_S)
    await stream.read()
    stream.cancel()
    spans = await traced.calls()
    ends = sorted((span.name.rpartition("/")[2], code_of(span)) for span in spans)
    assert ends == [
        ("Denoise", "NOT_FOUND"),
        ("Denoise", "OK"),
        ("Sample", "CANCELLED"),
        ("Sample", "OK"),
    ]
    (continued,) = (span for span in spans if span.parent_span_id)
    assert (continued.trace_id.hex(), continued.parent_span_id.hex()) == (TRACE, PARENT)
    for span in spans:
        assert before <= span.start_time_unix_nano <= span.end_time_unix_nano <= time.time_ns()


async def test_a_traced_call_is_an_exemplar_of_its_duration(traced: Traced) -> None:
    await traced.stub.Denoise(denoise(), metadata=SAMPLED, timeout=TIMEOUT_S)
    lines = (await asyncio.to_thread(traced.metrics)).splitlines()
    exemplars = [line for line in lines if f'# {{trace_id="{TRACE}"}}' in line]
    names = {line.partition("{")[0] for line in exemplars}
    assert names == {"els_request_seconds_bucket", "grpc_server_handling_seconds_bucket"}


async def test_a_servicer_knows_its_call_s_span_and_each_call_has_its_own(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, read = [], DenoiseMethod.read

    def watched(*arguments: Any) -> Any:
        call = CALL.get()
        seen.append(None if call is None else call.trace)
        return read(*arguments)

    monkeypatch.setattr(DenoiseMethod, "read", watched)
    await asyncio.gather(*(traced.stub.Denoise(denoise(), timeout=TIMEOUT_S) for _ in range(8)))
    assert all(isinstance(span, Span) for span in seen)
    assert len({id(span) for span in seen}) == 8
    assert CALL.get() is None
    assert len(await traced.calls()) == 8


async def test_a_computed_call_leads_to_its_batch_and_the_batch_to_its_calls(
    traced: Traced,
) -> None:
    # Enough pairs to be queued, and a small question that is answered on the spot.
    many = denoise(x=tensor(shape=(256, *SHAPE), data=bytes(256 * 120)), model="circular")
    asked = [many, many, many, denoise()]
    await asyncio.gather(*(traced.stub.Denoise(one, timeout=TIMEOUT_S) for one in asked))
    spans = await traced.spans()
    calls, queues, computes, batches = (
        [span for span in spans if span.name == name]
        for name in (METHOD, "queue", "compute", "batch")
    )
    assert len(calls) == len(asked)
    by_id = {span.span_id: span for span in calls}
    linked = {(link.span_id, batch.span_id) for batch in batches for link in batch.links}
    assert {call for call, _ in linked} == by_id.keys()
    assert {(one.parent_span_id, one.links[0].span_id) for one in computes} == linked
    for one in (*queues, *computes):
        call = by_id[one.parent_span_id]
        assert one.trace_id == call.trace_id
        # Two clocks meet here.
        assert call.start_time_unix_nano - 10**6 <= one.start_time_unix_nano
        assert one.start_time_unix_nano <= one.end_time_unix_nano
        assert one.end_time_unix_nano <= call.end_time_unix_nano + 10**6


@pytest.mark.parametrize("endpoint", ["collector:4317", "grpc://collector", "http://", ""])
def test_an_endpoint_without_scheme_or_host_is_refused(endpoint: str) -> None:
    with pytest.raises(ValidationError, match="traces"):
        Settings(traces=endpoint)


@pytest.mark.parametrize(("host", "asked"), [("localhost", False), ("collector.invalid", True)])
def test_spans_pass_a_proxy_of_the_environment_unless_their_collector_is_on_this_machine(
    sink: tuple[Sink, int], host: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    collector, port = sink
    with proxying(port) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        tracing = Tracing(f"http://{host}:{port}", 1)
        span = tracing.begin(METHOD, ())
        assert span is not None
        tracing.end(span, "OK", "m")
        tracing.close()
    assert collector.spans.qsize() == 1
    assert proxy.asked == ([f"{host}:{port}"] if asked else [])


@pytest.mark.slow
async def test_a_server_whose_collector_is_unreachable_serves_and_closes_in_time(
    tmp_path: Path,
) -> None:
    settings = Settings(
        models=write_models(tmp_path / "models"),
        port=0,
        metrics_port=0,
        traces="http://127.0.0.1:1",
        traces_ratio=1,
        grace_s=0,
    )
    server = Server(settings)
    ports = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc_port}") as channel:
        await DenoiserServiceStub(channel).Denoise(denoise(), timeout=TIMEOUT_S)
    start = time.monotonic()
    await server.close()
    assert time.monotonic() - start < 8


@pytest.mark.slow
def test_without_the_setting_nothing_of_opentelemetry_is_imported() -> None:
    script = (
        "import sys\n"
        "from els_service.config import Settings\n"
        "from els_service.server import server\n"
        "import asyncio\n"
        "async def main(): await server.Server(Settings(port=0, metrics_port=0)).close()\n"
        "asyncio.run(main())\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
