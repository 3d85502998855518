"""What an operator sees: health, reflection, metrics and logs of a real server process."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from tests.support.bad_requests import denoise, sample
from tests.support.metrics import metrics, value
from tests.support.models_folder import DOCUMENTS
from tests.support.processes import ServerProcess
from tests.support.refusals import TIMEOUT_S, refused

from els_client import Client
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_service.version import COMMIT, VERSION

SERVICES = ("denoise.v1.DenoiserService", "inference.GRPCInferenceService")
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("service", ["", *SERVICES, *sorted(DOCUMENTS)])
def test_health_of_server_services_and_models_is_serving(
    channel: grpc.Channel, service: str
) -> None:
    stub: Any = HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    assert stub.Check(request, timeout=TIMEOUT_S).status == SERVING
    watch = stub.Watch(request, timeout=TIMEOUT_S)
    assert next(watch).status == SERVING
    watch.cancel()


def test_health_of_something_unknown_is_unknown(channel: grpc.Channel) -> None:
    stub: Any = HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="nobody")
    assert refused(lambda: stub.Check(request, timeout=TIMEOUT_S)).code().name == "NOT_FOUND"
    watch = stub.Watch(request, timeout=TIMEOUT_S)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_reflection_lists_the_services_and_describes_their_methods(channel: grpc.Channel) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in SERVICES),
    ]
    stub: Any = ServerReflectionStub(channel)
    listed, *described = stub.ServerReflectionInfo(iter(requests), timeout=TIMEOUT_S)
    names = {service.name for service in listed.list_services_response.service}
    assert names >= {*SERVICES, "grpc.health.v1.Health"}
    for name, answer in zip(SERVICES, described, strict=True):
        files = [
            FileDescriptorProto.FromString(file)
            for file in answer.file_descriptor_response.file_descriptor_proto
        ]
        assert name in {f"{file.package}.{one.name}" for file in files for one in file.service}


def test_metrics_have_version_and_commit(server: ServerProcess) -> None:
    assert metrics(server)["els_build_info"] == [({"version": VERSION, "commit": COMMIT}, 1.0)]


def test_metrics_have_known_prefixes_seconds_and_labels(
    server: ServerProcess, client: Client
) -> None:
    # Enough pairs to be queued: small questions are answered on the spot.
    client.denoise(np.zeros((256, 1, 6, 5), np.float32), model="circular", sigma=1.0)
    found = metrics(server)
    assert {name.partition("_")[0] for name in found} == {"els", "grpc", "process"}
    labels = {
        "els_request_seconds": {"model", "method", "code"},
        "els_queue_seconds": {"model"},
        "els_compute_seconds": {"model"},
        "els_batch_size": {"model"},
        "els_batch_cost_seconds": {"model"},
    }
    for name, expected in labels.items():
        assert {frozenset(found) for found, _ in found[f"{name}_count"]} == {frozenset(expected)}
        assert any(number > 0 for _, number in found[f"{name}_sum"])


def test_every_call_is_counted_under_its_model_method_and_code(
    server: ServerProcess, client: Client, channel: grpc.Channel
) -> None:
    def count(**labels: str) -> float:
        return value(server, "els_request_seconds_count", **labels)

    asked = [
        {"model": "ideal", "method": "Denoise", "code": "OK"},
        {"model": "ideal", "method": "Sample", "code": "OK"},
        {"model": "zeros", "method": "Denoise", "code": "INVALID_ARGUMENT"},
        {"model": "", "method": "Denoise", "code": "NOT_FOUND"},
    ]
    before = [count(**labels) for labels in asked]
    images = value(server, "els_batch_size_sum", model="ideal")
    client.denoise(np.zeros((3, 1, 6, 5), np.float32), model="ideal", sigma=1.0)
    list(client.sample(model="ideal", count=2, steps=2))
    stub = DenoiserServiceStub(channel)
    refused(lambda: stub.Denoise(denoise(labels=[9]), timeout=TIMEOUT_S))
    refused(lambda: stub.Denoise(denoise(model="nobody"), timeout=TIMEOUT_S))
    assert [count(**labels) for labels in asked] == [number + 1 for number in before]
    assert value(server, "els_batch_size_sum", model="ideal") == images + 3 + 2 * 2


def test_calls_have_the_metrics_that_grpc_dashboards_know(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    def count(name: str, method: str, kind: str, **labels: str) -> float:
        labels |= {"grpc_type": kind, "grpc_service": SERVICES[0], "grpc_method": method}
        return value(server, f"grpc_server_{name}", **labels)

    asked: list[tuple[str, str, str, dict[str, str], int]] = [
        ("started_total", "GetModel", "unary", {}, 2),
        ("handled_total", "GetModel", "unary", {"grpc_code": "OK"}, 1),
        ("handled_total", "GetModel", "unary", {"grpc_code": "NotFound"}, 1),
        ("handling_seconds_count", "GetModel", "unary", {}, 2),
        ("msg_sent_total", "GetModel", "unary", {}, 1),
        ("msg_received_total", "Sample", "server_stream", {}, 1),
        ("msg_sent_total", "Sample", "server_stream", {}, 3),
        ("msg_received_total", "DenoiseStream", "bidi_stream", {}, 2),
        ("msg_sent_total", "DenoiseStream", "bidi_stream", {}, 2),
    ]
    before = [count(*one[:3], **one[3]) for one in asked]
    stub = DenoiserServiceStub(channel)
    stub.GetModel(pb.GetModelRequest(name="ideal"), timeout=TIMEOUT_S)
    refused(lambda: stub.GetModel(pb.GetModelRequest(name="nobody"), timeout=TIMEOUT_S))
    list(stub.Sample(sample(steps=3), timeout=TIMEOUT_S))
    list(stub.DenoiseStream(iter([denoise(), denoise(labels=[9])]), timeout=TIMEOUT_S))
    rises = [count(*one[:3], **one[3]) - was for one, was in zip(asked, before, strict=True)]
    assert rises == [rise for *_, rise in asked]
    labels = {"model": "ideal", "method": "GetModel", "code": "OK"}
    assert value(server, "els_request_seconds_count", **labels) >= 1


def test_gauges_of_the_engine_and_the_process_are_there(server: ServerProcess) -> None:
    found = metrics(server)
    for name in ("els_queue_items", "els_queue_cost_seconds", "els_model_memory_bytes"):
        assert {labels["model"] for labels, _ in found[name]} <= DOCUMENTS.keys()
    assert found["els_trajectories"] == [({}, 0.0)]
    for name in (
        "els_device_busy_seconds_total",
        "els_event_loop_lag_seconds_count",
        "process_resident_memory_bytes",
        "process_open_fds",
    ):
        assert found[name][0][1] > 0


def test_logs_carry_the_trace_of_the_caller(server: ServerProcess, channel: grpc.Channel) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    metadata = (("traceparent", f"00-{trace_id}-b7ad6b7169203331-00"),)
    stub = DenoiserServiceStub(channel)
    refused(lambda: stub.Denoise(denoise(labels=[9]), timeout=TIMEOUT_S, metadata=metadata))
    assert server.records()[-1]["trace_id"] == trace_id


def test_names_of_unknown_models_make_no_new_time_series(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    stub = DenoiserServiceStub(channel)
    refused(lambda: stub.Denoise(denoise(model="made-up"), timeout=TIMEOUT_S))
    models = {labels["model"] for labels, _ in metrics(server)["els_request_seconds_count"]}
    assert models <= {"", *DOCUMENTS}


def test_logs_carry_the_caller_s_request_id_or_a_new_one(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    def logged() -> list[dict[str, Any]]:
        return [record for record in server.records() if record["event"] == "call"]

    stub, bad = DenoiserServiceStub(channel), denoise(labels=[9])
    refused(
        lambda: stub.Denoise(bad, timeout=TIMEOUT_S, metadata=(("x-request-id", "id-of-mine"),))
    )
    mine = logged()[-1]
    refused(lambda: stub.Denoise(bad, timeout=TIMEOUT_S))
    other = logged()[-1]
    assert mine["request_id"] == "id-of-mine"
    assert len(other["request_id"]) == 32
    for record in (mine, other):
        assert (record["method"], record["model"]) == ("Denoise", "zeros")
        assert (record["code"], record["level"]) == ("INVALID_ARGUMENT", "info")
        assert record["reason"] == "labels: expected -1 to 2, got 9"
        assert record["timestamp"].endswith("Z")
        assert record["seconds"] >= 0
