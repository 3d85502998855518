from __future__ import annotations

import asyncio
import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from els_service.engine.request_context import BatchRecord, Observer
from els_service.server.telemetry import process
from els_service.server.telemetry.histogram import PENDING, Histogram, family, merged
from els_service.server.telemetry.metrics import RETAIN_S, RETAINED_MODELS, Metrics

BOUNDS = (0.001, 0.5, 1, 10.0)
METHOD = {
    "grpc_type": "unary",
    "grpc_service": "denoise.v1.DenoiserService",
    "grpc_method": "Denoise",
}


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Return one sample, None where there is none."""
    return metrics.registry.get_sample_value(name, labels)


@given(st.lists(st.sampled_from(BOUNDS) | st.floats(0, 1e9)))
def test_a_histogram_has_the_samples_of_the_library_s_own_histogram(values: list[float]) -> None:
    registry, histogram = CollectorRegistry(), Histogram(BOUNDS)
    library = PrometheusHistogram("h", "text", ("label",), buckets=BOUNDS, registry=registry)
    oracle = library.labels("one")
    for value in values:
        oracle.observe(value)
        histogram.observe(value)
    (expected,) = registry.collect()
    kept = [found for found in expected.samples if not found.name.endswith("_created")]
    assert family("h", "text", ("label",), [(("one",), histogram)]).samples == kept


def test_merged_histograms_count_every_value_once() -> None:
    histograms = [Histogram(BOUNDS) for _ in range(3)]
    for histogram, value in zip(histograms, (0.1, 0.7, 99.0), strict=True):
        histogram.observe(value)
    one = merged(histograms, BOUNDS)
    counts, total = one.read()
    assert counts == [0, 1, 1, 0, 1]
    assert total == pytest.approx(99.8)
    assert merged([], BOUNDS).count == 0


def test_a_histogram_counts_every_value_of_every_thread_while_it_is_read() -> None:
    histogram = Histogram(BOUNDS)
    with ThreadPoolExecutor(4) as threads:
        writers = [threads.submit(_observe, histogram, PENDING * 20) for _ in range(3)]
        seen = []
        while not all(writer.done() for writer in writers):
            counts, total = histogram.read()
            assert total == pytest.approx(0.5 * sum(counts))
            seen.append(sum(counts))
    assert seen == sorted(seen)
    assert histogram.count == 3 * PENDING * 20
    assert len(histogram._pending) == 0


def _observe(histogram: Histogram, count: int) -> None:
    for _ in range(count):
        histogram.observe(0.5)


def test_few_values_of_a_histogram_are_pending() -> None:
    histogram = Histogram(BOUNDS)
    for _ in range(3 * PENDING):
        histogram.observe(0.5)
        assert len(histogram._pending) < PENDING


def test_calls_are_counted_as_go_grpc_prometheus_counts_them() -> None:
    metrics = Metrics()
    unary = metrics.method("unary", METHOD["grpc_service"], "Denoise")
    unary.started, unary.received = 3, 3
    unary.end("m", "OK", 0.02)
    unary.end("", "INVALID_ARGUMENT", 0.5)
    assert sample(metrics, "grpc_server_started_total", **METHOD) == 3
    assert sample(metrics, "grpc_server_msg_received_total", **METHOD) == 3
    # A refusal is a status, not a message.
    assert sample(metrics, "grpc_server_msg_sent_total", **METHOD) == 1
    for code, count in {"OK": 1, "InvalidArgument": 1}.items():
        assert sample(metrics, "grpc_server_handled_total", **METHOD, grpc_code=code) == count
    assert sample(metrics, "grpc_server_handling_seconds_count", **METHOD) == 2
    assert sample(metrics, "grpc_server_handling_seconds_sum", **METHOD) == pytest.approx(0.52)
    assert (
        sample(metrics, "els_request_seconds_sum", model="m", method="Denoise", code="OK") == 0.02
    )


def test_streams_count_their_messages_one_by_one() -> None:
    metrics = Metrics()
    stream = metrics.method("bidi_stream", "s", "M")
    stream.received, stream.sent = 7, 5
    stream.end("", "CANCELLED", 1.0)
    labels = {"grpc_type": "bidi_stream", "grpc_service": "s", "grpc_method": "M"}
    assert sample(metrics, "grpc_server_msg_received_total", **labels) == 7
    assert sample(metrics, "grpc_server_msg_sent_total", **labels) == 5
    assert sample(metrics, "grpc_server_handled_total", **labels, grpc_code="Canceled") == 1


def test_a_method_without_calls_is_exported_with_zeros() -> None:
    metrics = Metrics()
    metrics.method("unary", METHOD["grpc_service"], "Denoise")
    assert sample(metrics, "grpc_server_started_total", **METHOD) == 0
    for code in ("OK", "Canceled", "Internal"):
        assert sample(metrics, "grpc_server_handled_total", **METHOD, grpc_code=code) == 0
    assert sample(metrics, "grpc_server_handling_seconds_count", **METHOD) == 0


def test_events_of_the_engine_are_counted_by_model() -> None:
    launches: list[BatchRecord] = []
    metrics = Metrics(launches.append)
    observer: Observer = metrics
    launch = BatchRecord("m", "cpu", 0, 1, 8, 0.25, (None,), (0,))
    observer.on_queued("m", 0.5)
    observer.on_computed("m", 0.3, 8, 0.25)
    observer.on_batch(launch)
    for reason in ("expired", "expired", "cancelled"):
        observer.on_dropped("m", reason)
    assert launches == [launch]
    for name, total in {
        "els_queue_seconds": 0.5,
        "els_compute_seconds": 0.3,
        "els_batch_size": 8,
        "els_batch_cost_seconds": 0.25,
    }.items():
        assert sample(metrics, f"{name}_sum", model="m") == total
        assert sample(metrics, f"{name}_count", model="m") == 1
    assert sample(metrics, "els_dropped_total", model="m", reason="expired") == 2
    assert sample(metrics, "els_dropped_total", model="m", reason="cancelled") == 1
    assert sample(metrics, "els_dropped_total", model="m", reason="faulted") == 0


def test_gauges_are_computed_at_each_scrape() -> None:
    metrics = Metrics()
    depth = 3.0
    metrics.gauges = lambda: [
        ("els_queue_items", {"model": "a"}, depth),
        ("els_queue_items", {"model": "b"}, 0.0),
        # Another version of it.
        ("els_queue_items", {"model": "b"}, 5.0),
        ("els_device_busy_seconds_total", {"device": "cpu"}, 1.5),
        ("els_trajectories", {}, 2.0),
    ]
    assert sample(metrics, "els_queue_items", model="a") == 3
    depth = 4.0
    assert sample(metrics, "els_queue_items", model="a") == 4
    assert sample(metrics, "els_queue_items", model="b") == 5
    assert sample(metrics, "els_device_busy_seconds_total", device="cpu") == 1.5
    assert sample(metrics, "els_trajectories") == 2


def test_memory_and_file_descriptors_of_the_process_are_there() -> None:
    metrics = Metrics()
    assert (sample(metrics, "process_resident_memory_bytes") or 0) > 1 << 20
    assert (sample(metrics, "process_open_fds") or 0) > 0


# There is nothing to count with elsewhere.
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc")
def test_memory_that_malloc_has_handed_out_counts_until_it_is_freed() -> None:
    metrics, taken = Metrics(), 50 << 20
    before = sample(metrics, "els_malloc_used_bytes") or 0
    block = bytearray(taken)
    during = sample(metrics, "els_malloc_used_bytes") or 0
    del block
    after = sample(metrics, "els_malloc_used_bytes") or 0
    assert during - before == pytest.approx(taken, rel=0.1)
    assert after - before == pytest.approx(0, abs=taken / 10)
    assert (sample(metrics, "els_python_blocks") or 0) > 1000


def test_an_exemplar_names_the_latest_trace_of_its_bucket_in_openmetrics_alone() -> None:
    metrics = Metrics()
    method = metrics.method("unary", "s", "M")
    for trace_id in ("a" * 32, "b" * 32):
        method.end("m", "OK", 0.02, trace_id)
    method.end("m", "OK", 5.0)
    # Its parser holds to the letter of the format.
    # Neither end of the format has types.
    page = openmetrics.generate_latest(metrics.registry).decode()  # type: ignore[no-untyped-call]
    # As above.
    families = list(parse_openmetrics(page))  # type: ignore[no-untyped-call]
    exemplars = [
        (found.labels["le"], found.exemplar.labels, found.exemplar.value)
        for one in families
        for found in one.samples
        if found.name == "els_request_seconds_bucket" and found.exemplar
    ]
    assert exemplars == [("0.025", {"trace_id": "b" * 32}, 0.02)]
    assert b"trace_id" not in generate_latest(metrics.registry)


@pytest.mark.slow
def test_a_scrape_that_meets_new_models_and_codes_sees_whole_histograms() -> None:
    metrics, stop = Metrics(), Event()
    method = metrics.method("unary", "s", "M")

    def write() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 1) % 500
            method.end(f"m{number}", "OK", 0.02)
            metrics.on_queued(f"m{number}", 0.1)
            metrics.on_computed(f"m{number}", 0.1, 1, 0.1)
            metrics.on_dropped(f"m{number}", "expired")

    writer = Thread(target=write)
    writer.start()
    try:
        counts = [
            sample(
                metrics,
                "grpc_server_handling_seconds_count",
                grpc_type="unary",
                grpc_service="s",
                grpc_method="M",
            )
            for _ in range(10)
        ]
    finally:
        stop.set()
        writer.join()
    assert counts == sorted(count or 0 for count in counts)


async def test_a_blocked_event_loop_shows_as_lag() -> None:
    metrics, observed = Metrics(), asyncio.Event()

    def lagged(seconds: float) -> None:
        metrics.lagged(seconds)
        observed.set()

    watching = asyncio.create_task(process.watch_loop_lag(lagged, interval_s=0.01))
    # So that it sleeps already.
    await asyncio.sleep(0)
    time.sleep(0.2)
    await observed.wait()
    watching.cancel()
    assert (sample(metrics, "els_event_loop_lag_latest_seconds") or 0) > 0.15
    assert sample(metrics, "els_event_loop_lag_seconds_count") == 1


def call_each(metrics: Metrics, *models: str) -> None:
    """Call each model once, with every kind of event that creates series."""
    for model in models:
        method = next(iter(metrics._methods), None) or metrics.method("unary", "s", "M")
        method.end(model, "OK", 0.02)
        metrics.on_queued(model, 0.1)
        metrics.on_computed(model, 0.1, 1, 0.1)
        metrics.on_dropped(model, "expired")


def models_of(metrics: Metrics) -> set[str]:
    """Return the models that any series names."""
    return {
        sample.labels["model"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if "model" in sample.labels
    }


def test_series_of_a_model_end_an_hour_after_its_unload_and_those_of_served_ones_never() -> None:
    metrics = Metrics()
    call_each(metrics, "kept", "gone", "")
    for now in (0.0, 1e6):
        metrics.retire(["kept", "gone"], now)
        assert models_of(metrics) == {"kept", "gone", ""}
    metrics.retire(["kept"], 1e6 + 5)
    metrics.retire(["kept"], 1e6 + 4 + RETAIN_S)
    assert models_of(metrics) == {"kept", "gone", ""}
    metrics.retire(["kept"], 1e6 + 5 + RETAIN_S)
    assert models_of(metrics) == {"kept", ""}


def test_a_model_that_is_loaded_again_in_time_goes_on_with_its_series() -> None:
    metrics = Metrics()
    call_each(metrics, "m")
    metrics.retire([], 0.0)
    metrics.retire(["m"], RETAIN_S - 1)
    metrics.retire([], RETAIN_S)
    metrics.retire([], 2 * RETAIN_S - 1)
    call_each(metrics, "m")
    assert sample(metrics, "els_request_seconds_count", model="m", method="M", code="OK") == 2
    metrics.retire([], 2 * RETAIN_S)
    assert models_of(metrics) == set()


def test_counts_of_a_method_do_not_go_back_when_series_of_models_end() -> None:
    metrics, labels = Metrics(), {"grpc_type": "unary", "grpc_service": "s", "grpc_method": "M"}
    counts = []
    for number in range(3):
        call_each(metrics, f"m{number}", f"n{number}")
        metrics.retire([], number * 2 * RETAIN_S)
        metrics.retire([], (number * 2 + 1) * RETAIN_S)
        assert models_of(metrics) == set()
        counts.append(
            [
                sample(metrics, "grpc_server_handled_total", **labels, grpc_code="OK"),
                sample(metrics, "grpc_server_msg_sent_total", **labels),
                sample(metrics, "grpc_server_handling_seconds_count", **labels),
            ]
        )
    assert counts == [[2] * 3, [4] * 3, [6] * 3]


def test_models_loaded_and_unloaded_in_turn_leave_a_bounded_number_of_series() -> None:
    metrics = Metrics()
    names = [f"m{number:03}" for number in range(3 * RETAINED_MODELS)]
    for second, name in enumerate(names):
        call_each(metrics, name)
        metrics.retire(["served", name], second)
    metrics.retire(["served"], len(names))
    assert models_of(metrics) == set(names[-RETAINED_MODELS:])
