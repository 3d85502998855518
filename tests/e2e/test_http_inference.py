"""The Open Inference Protocol over REST: metadata, JSON and binary tensors, equal to gRPC's."""

from __future__ import annotations

import gzip
import json
from typing import Any

import grpc
import numpy as np
from tests.support.http_client import HttpClient, Reply

from els_proto.inference import grpc_service_pb2 as pb
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from els_service.version import FULL

SHAPE = [2, 1, 6, 5]
PIXELS = np.linspace(-1, 1, 60, dtype=np.float32).reshape(SHAPE)
SIGMAS = np.array([0.5, 2.0], np.float32)
PATH = "/v2/models/zeros/infer"
EVERY = ("denoised", "score", "log_evidence")


def body(**changes: Any) -> dict[str, Any]:
    """Return a request for two images in JSON."""
    return {
        "id": "7",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": SHAPE, "data": PIXELS.tolist()},
            {"name": "sigma", "datatype": "FP32", "shape": [2], "data": SIGMAS.tolist()},
            {"name": "label", "datatype": "INT64", "shape": [2], "data": [1, -1]},
        ],
        **changes,
    }


def by_grpc(channel: grpc.Channel) -> dict[str, bytes]:
    """Return the outputs of the same request over gRPC."""
    request = pb.ModelInferRequest(model_name="zeros")
    for name, datatype, values in (
        ("x", "FP32", PIXELS),
        ("sigma", "FP32", SIGMAS),
        ("label", "INT64", np.array([1, -1])),
    ):
        request.inputs.add(name=name, datatype=datatype, shape=values.shape)
        request.raw_input_contents.append(values.tobytes())
    answer = GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30)
    return {
        output.name: raw
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


def outputs_of(reply: Reply) -> dict[str, bytes]:
    """Return the outputs of a response as bytes, from arrays and from binary data."""
    assert reply.status == 200, reply.body
    length = int(reply.headers.get("inference-header-content-length", len(reply.body)))
    found, rest = {}, reply.body[length:]
    for output in json.loads(reply.body[:length])["outputs"]:
        assert output["datatype"] == "FP32"
        if "data" in output:
            values = np.array(output["data"], np.float32)
            assert values.size == np.prod(output["shape"])
            found[output["name"]] = values.tobytes()
        else:
            size = output["parameters"]["binary_data_size"]
            found[output["name"]], rest = rest[:size], rest[size:]
    assert rest == b""
    return found


def test_json_has_the_bits_of_grpc(http: HttpClient, channel: grpc.Channel) -> None:
    reply = http.post(PATH, body())
    assert reply.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in reply.headers
    assert (reply.json["id"], reply.json["model_version"]) == ("7", "1")
    assert outputs_of(reply) == by_grpc(channel)


def test_binary_tensors_have_the_bits_of_grpc(http: HttpClient, channel: grpc.Channel) -> None:
    request = body(parameters={"binary_data_output": True, "priority": 1, "timeout": 9_000_000})
    contents = [PIXELS.tobytes(), SIGMAS.tobytes(), np.array([1, -1]).tobytes()]
    for one, raw in zip(request["inputs"], contents, strict=True):
        del one["data"]
        one["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps(request).encode()
    whole, length = head + b"".join(contents), {"Inference_Header_Content_Length": str(len(head))}
    plain = http.post(PATH, whole, **length)
    assert plain.headers["content-type"] == "application/octet-stream"
    compressed = http.post(PATH, gzip.compress(whole), Content_Encoding="gzip", **length)
    assert outputs_of(plain) == outputs_of(compressed) == by_grpc(channel)


def test_binary_and_json_mix_in_one_request_and_one_response(
    http: HttpClient, channel: grpc.Channel
) -> None:
    score = {"name": "score", "parameters": {"binary_data": True}}
    request = body(outputs=[score, {"name": "denoised"}])
    del request["inputs"][0]["data"]
    request["inputs"][0]["parameters"] = {"binary_data_size": 240}
    head = json.dumps(request).encode()
    length = str(len(head))
    reply = http.post(PATH, head + PIXELS.tobytes(), Inference_Header_Content_Length=length)
    size = int(reply.headers["inference-header-content-length"])
    assert len(reply.body) == size + 240
    expected = by_grpc(channel)
    assert outputs_of(reply) == {name: expected[name] for name in ("score", "denoised")}


def test_a_large_response_comes_whole(http: HttpClient) -> None:
    pixels = np.random.default_rng(0).normal(size=(64, 3, 32, 32)).astype(np.float32)
    head = json.dumps(
        {
            "parameters": {"binary_data_output": True},
            "inputs": [
                {
                    "name": "x",
                    "datatype": "FP32",
                    "shape": pixels.shape,
                    "parameters": {"binary_data_size": pixels.nbytes},
                },
                {"name": "sigma", "datatype": "FP32", "shape": [1], "data": [1.0]},
            ],
        }
    ).encode()
    path, length = "/v2/models/gaussian/infer", str(len(head))
    for _ in range(3):
        reply = http.post(path, head + pixels.tobytes(), Inference_Header_Content_Length=length)
        assert {name: len(raw) for name, raw in outputs_of(reply).items()} == {
            "denoised": pixels.nbytes,
            "score": pixels.nbytes,
        }


def test_a_bare_nan_is_rejected_as_over_grpc_with_the_field_named(http: HttpClient) -> None:
    request = body()
    request["inputs"][0]["data"][0][0][0][0] = float("nan")
    sent = json.dumps(request).encode()
    assert b"NaN" in sent
    reply = http.post(PATH, sent)
    assert reply.status == 400
    assert reply.json["error"] == "x: expected finite pixels, |x| <= 1e+09, got nan"


def test_health_metadata_configuration_and_statistics_are_those_of_grpc(http: HttpClient) -> None:
    assert (http.get("/v2/health/live").status, http.get("/v2/health/ready").status) == (200, 200)
    server = http.get("/v2").json
    assert (server["name"], server["version"]) == ("els-denoise", FULL)
    assert "binary_tensor_data" in server["extensions"]
    for path in ("/v2/models/zeros", "/v2/models/zeros/versions/1"):
        model = http.get(path).json
        assert model["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 1, 6, 5]}
        assert [one["name"] for one in model["outputs"]] == [*EVERY]
        assert http.get(f"{path}/ready").json == {"name": "zeros", "ready": True}
        assert http.get(f"{path}/config").json["dynamic_batching"]["priority_levels"] == 3
        (found,) = http.get(f"{path}/stats").json["model_stats"]
        assert found["name"] == "zeros"
    assert http.get("/v2/models/zeros/versions/2").status == 404
    assert http.get("/v2/models/absent/ready").json == {"name": "absent", "ready": False}
    index = http.post("/v2/repository/index", {"ready": True}).json
    assert {"name": "zeros", "version": "1", "state": "READY", "reason": ""} in index


def test_a_model_is_unloaded_and_loaded_and_the_log_level_set(http: HttpClient) -> None:
    assert http.post("/v2/repository/models/valid/unload", {}).status == 200
    assert http.get("/v2/models/valid/ready").status == 404
    assert http.post("/v2/repository/models/valid/load", {}).status == 200
    assert http.get("/v2/models/valid/ready").status == 200
    assert http.post("/v2/repository/models/absent/load", {}).status == 404
    before = http.get("/v2/logging").json
    assert http.post("/v2/logging", {"log_verbose_level": 1}).json["log_level"] == "debug"
    assert http.post("/v2/logging", {"log_level": before["log_level"]}).json == before
    assert http.post("/v2/logging", {"log_level": 1}).json["field"] == "settings.log_level"


def test_a_page_of_another_site_may_not_ask(http: HttpClient) -> None:
    own = f"http://127.0.0.1:{http.port}"
    assert http.post(PATH, body(), Origin=own).status == 200
    foreign = "http://evil.example", "null"
    for headers in (*({"Origin": origin} for origin in foreign), {"Host": "evil.example"}):
        reply = http.post(PATH, body(), **headers)
        assert (reply.status, reply.json["code"]) == (403, "PERMISSION_DENIED")
    assert http.get("/v1/models", Host="evil.example:80").status == 403
    assert http.get("/v1/models", Host=f"[::1]:{http.port}").status == 200


def test_requests_are_counted_as_calls_of_the_rpc(http: HttpClient, server: Any) -> None:
    def count() -> float:
        _, text = server.page("/metrics")
        series = 'els_request_seconds_count{code="OK",method="ModelInfer",model="zeros"} '
        return float(text.partition(series)[2].partition("\n")[0])

    assert http.post(PATH, body()).status == 200
    before = count()
    assert http.post(PATH, body()).status == 200
    assert count() == before + 1
