"""Bad requests over HTTP: the tables of gRPC's tests, with the same field, expected and got."""

from __future__ import annotations

import gzip
import json
import random
import socket
from contextlib import closing
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from tests.support.bad_inferences import INFERENCES
from tests.support.bad_requests import QUERIES, SAMPLES, Bad
from tests.support.http_client import TIMEOUT_S, HttpClient, Reply
from tests.support.processes import ServerProcess

from els_proto.inference import grpc_service_pb2 as inference

LAYOUTS = {"FP32": "<f4", "INT64": "<i8"}
OTHER_FORM = ("buffers too few", "buffers too many")
"""Of messages alone: in HTTP's form each tensor has its own size."""


pytestmark = pytest.mark.usefixtures("unharmed")


def good(**changes: Any) -> dict[str, Any]:
    """Return a good body of ``infer``, but for the changes."""
    x = {"name": "x", "datatype": "FP32", "shape": [1, 1, 6, 5], "data": [0.0] * 30}
    sigma = {"name": "sigma", "datatype": "FP32", "shape": [1], "data": [1.0]}
    return {"inputs": [x, sigma], **changes}


def described(request: inference.ModelInferRequest) -> dict[str, Any]:
    """Return the JSON of a request without contents."""
    inputs: list[dict[str, Any]] = [
        {"name": one.name, "datatype": one.datatype, "shape": list(one.shape)}
        for one in request.inputs
    ]
    return {"inputs": inputs, "outputs": [{"name": one.name} for one in request.outputs]}


def as_json(request: inference.ModelInferRequest) -> dict[str, Any] | None:
    """Return the body with its contents as JSON; None if they are no numbers."""
    body = described(request)
    if not request.raw_input_contents:
        for one, typed in zip(body["inputs"], request.inputs, strict=True):
            one["data"] = list(typed.contents.fp32_contents)
        return body
    for one, raw in zip(body["inputs"], request.raw_input_contents, strict=True):
        layout = np.dtype(LAYOUTS.get(one["datatype"], "u1"))
        if len(raw) % layout.itemsize:
            return None
        one["data"] = np.frombuffer(raw, layout).tolist()
    return body


def post_binary(
    http: HttpClient, path: str, body: dict[str, Any], contents: list[bytes], **headers: str
) -> Reply:
    """Return the response to a body with binary contents, a size beside each input."""
    for one, raw in zip(body["inputs"], contents, strict=True):
        one["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps(body).encode()
    given = {"Inference_Header_Content_Length": str(len(head)), **headers}
    return http.post(path, head + b"".join(contents), **given)


def assert_rejected(reply: Reply, field: str, expected: str, got: str, code: str) -> None:
    """Check status and body; expected and got may be the beginnings of what is said."""
    body = reply.json
    assert (reply.status, body["code"], body["field"]) == (400, code, field), body
    assert body["description"].startswith(f"expected {expected}"[:150]), body
    assert f", got {got}" in body["description"]
    assert body["error"] == f"{field}: {body['description']}"


@pytest.mark.parametrize("bad", QUERIES.values(), ids=QUERIES)
def test_a_bad_query_is_rejected_with_field_expected_and_got(http: HttpClient, bad: Bad) -> None:
    body = MessageToDict(bad.request, preserving_proto_field_name=True)
    model = body.pop("model")
    for method in ("denoise", "score"):
        reply = http.post(f"/v1/models/{model}:{method}", body)
        assert_rejected(reply, *bad[1:])


@pytest.mark.parametrize("bad", SAMPLES.values(), ids=SAMPLES)
def test_a_bad_sample_is_rejected_with_field_expected_and_got(http: HttpClient, bad: Bad) -> None:
    body = MessageToDict(
        bad.request, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    reply = http.post(f"/v1/models/{body['model']}:sample", body)
    assert_rejected(reply, *bad[1:])
    lines = http.post(f"/v1/models/{body['model']}:sample", body, Accept="application/x-ndjson")
    assert_rejected(lines, *bad[1:])


@pytest.mark.parametrize("name", [name for name in INFERENCES if name not in OTHER_FORM])
def test_a_bad_inference_is_rejected_with_field_expected_and_got(
    http: HttpClient, name: str
) -> None:
    request, field, expected, got, code = INFERENCES[name]
    assert isinstance(request, inference.ModelInferRequest)
    path = f"/v2/models/{request.model_name}/infer"
    if request.raw_input_contents:
        reply = post_binary(http, path, described(request), [*request.raw_input_contents])
        assert_rejected(reply, field, expected, got, code)
    if (body := as_json(request)) is not None:
        reply = http.post(path, body)
        found = reply.json
        assert (reply.status, found["field"], found["code"]) == (400, field, code), found


@pytest.mark.parametrize("name", ["absent", "zeros ", "ZEROS", "../zeros", "é" * 1000])
def test_an_unknown_model_is_404(http: HttpClient, name: str) -> None:
    path = quote(name, safe="")
    for reply in (
        http.post(f"/v1/models/{path}:denoise", {"sigma": 1}),
        http.post(f"/v1/models/{path}:sample", {}),
        http.post(f"/v2/models/{path}/infer", good()),
        http.get(f"/v2/models/{path}/ready"),
        http.get(f"/v2/models/{path}/config"),
    ):
        assert reply.status == 404
        assert reply.json.keys() & {"error", "ready"}


BODIES: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "body"),
    "trailing comma": (b'{"inputs": [],}', "body"),
    "no UTF-8": (b'{"id": "\xff"}', "body"),
    "nested too deep": (b"[" * 100_000, "body"),
    "a vast number": (b'{"inputs": [' + b"9" * 10_000 + b"]}", "body"),
    "an array": ([], "body"),
    "NaN alone": (b"NaN", "body"),
    "id a number": (good(id=7), "id"),
    "inputs an object": (good(inputs={}), "inputs"),
    "input a number": (good(inputs=[1]), "inputs[0]"),
    "name a number": (good(inputs=[{"name": 1}]), "inputs[0].name"),
    "shape a number": (good(inputs=[{"name": "x", "shape": 1}]), "inputs[0].shape"),
    "shape of fractions": (good(inputs=[{"name": "x", "shape": [1.5]}]), "inputs[0].shape"),
    "shape of truths": (good(inputs=[{"name": "x", "shape": [True]}]), "inputs[0].shape"),
    "shape too vast": (good(inputs=[{"name": "x", "shape": [2**63]}]), "inputs[0].shape"),
    "outputs a string": (good(outputs="score"), "outputs"),
    "binary flag a number": (
        good(outputs=[{"name": "score", "parameters": {"binary_data": 1}}]),
        "outputs[0].parameters.binary_data",
    ),
    "classification": (
        good(outputs=[{"name": "score", "parameters": {"classification": 3}}]),
        "outputs[0].parameters.classification",
    ),
    "parameters an array": (good(parameters=[]), "parameters"),
    "a parameter an object": (good(parameters={"priority": {}}), "parameters.priority"),
    "priority out of range": (good(parameters={"priority": 9}), "parameters.priority"),
    "priority a fraction": (good(parameters={"priority": 1.5}), "parameters.priority"),
    "priority too vast": (good(parameters={"priority": 2**64}), "parameters.priority"),
}

DATA: dict[str, Any] = {
    "strings": ["0.5"] * 30,
    "nulls": [None] * 30,
    "truths": [True] * 30,
    "an object": {"0": 0.0},
    "numbers beside arrays": [0.0, [0.0] * 29],
}


@pytest.mark.parametrize(("body", "field"), BODIES.values(), ids=BODIES)
def test_a_bad_body_is_rejected_and_the_field_named(
    http: HttpClient, body: Any, field: str
) -> None:
    reply = http.post("/v2/models/zeros/infer", body)
    assert (reply.status, reply.json["field"]) == (400, field), reply.json


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_data_that_are_no_numbers_are_rejected(http: HttpClient, data: Any) -> None:
    body = good()
    body["inputs"][0]["data"] = data
    reply = http.post("/v2/models/zeros/infer", body)
    assert (reply.status, reply.json["field"]) == (400, "inputs[0].data"), reply.json


@pytest.mark.parametrize("size", ["0", "-1", "x", "1e3", "9999999", "9" * 5000, "¹"])
def test_a_wrong_length_of_the_json_part_is_rejected(http: HttpClient, size: str) -> None:
    reply = http.post("/v2/models/zeros/infer", good(), Inference_Header_Content_Length=size)
    assert reply.status == 400
    assert reply.json["field"] == "Inference-Header-Content-Length"


def test_binary_data_that_do_not_add_up_are_rejected(http: HttpClient) -> None:
    path, x = "/v2/models/zeros/infer", bytes(120)
    body = good()
    for one in body["inputs"]:
        del one["data"]
    for sizes, contents, field in (
        ((120, 8), x + bytes(4), "inputs[1].parameters.binary_data_size"),
        ((120, -1), x + bytes(4), "inputs[1].parameters.binary_data_size"),
        ((120, "4"), x + bytes(4), "inputs[1].parameters.binary_data_size"),
        ((120, 4), x + bytes(9), "body"),
    ):
        for one, size in zip(body["inputs"], sizes, strict=True):
            one["parameters"] = {"binary_data_size": size}
        head = json.dumps(body).encode()
        length = str(len(head))
        reply = http.post(path, head + contents, Inference_Header_Content_Length=length)
        assert (reply.status, reply.json["field"]) == (400, field), reply.json


def test_an_unfinite_number_is_named_in_a_long_document(http: HttpClient) -> None:
    many = "0.5," * 30_000
    for name in ("NaN", "-Infinity"):
        reply = http.post("/v2/models/zeros/infer", f'{{"inputs": [{many} {name}]}}'.encode())
        assert reply.status == 400
        expected = f"body: expected finite numbers, as JSON has no others, got {name[-8:]} at char"
        assert reply.json["error"].startswith(expected)


def test_pictures_that_are_damaged_or_too_large_are_rejected(http: HttpClient) -> None:
    head = b"\x89PNG\r\n\x1a\n" + bytes(4) + b"IHDR"
    vast, damaged = (head + 2 * side.to_bytes(4, "big") + bytes(5) for side in (2**31 - 1, 5))
    for file in (b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(60), vast, damaged):
        reply = http.post("/v1/models/zeros:denoise?sigma=1", file, Content_Type="image/png")
        assert (reply.status, reply.json["field"]) == (400, "x"), reply.json


def test_what_is_no_route_or_method_is_404_or_405(http: HttpClient) -> None:
    for path in ("/v2/", "/v3", "/v2/models/zeros/explode", "/v1/models/zeros:explode"):
        assert http.get(path).status == 404
        assert http.post(path, {}).status == 404
    for path in ("/v1/models/zeros:explode", "/v1/models/zeros/versions/1:explode"):
        reply = http.post(path, {})
        assert (reply.status, reply.json["code"]) == (404, "NOT_FOUND")
        assert "method: expected one of denoise, score, sample" in reply.json["error"]
    for path in ("/v2/models/zeros/infer", "/v1/models/zeros:denoise"):
        reply = http.get(path)
        assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert http.ask("DELETE", "/v2", None).status == 405


def test_a_wrong_deadline_is_rejected(http: HttpClient) -> None:
    for seconds in ("0", "-1", "nan", "inf", "soon", "1e9", ""):
        reply = http.post("/v2/models/zeros/infer", good(), Request_Timeout=seconds)
        assert (reply.status, reply.json["field"]) == (400, "Request-Timeout")


def test_encodings_other_than_gzip_and_damaged_gzip_are_rejected(http: HttpClient) -> None:
    path = "/v2/models/zeros/infer"
    whole = gzip.compress(json.dumps(good()).encode())
    assert http.post(path, whole, Content_Encoding="gzip").status == 200
    for encoding, data, field in (
        ("deflate", whole, "Content-Encoding"),
        ("br", whole, "Content-Encoding"),
        ("gzip", whole[:-9], "body"),
        ("gzip", b"{}", "body"),
        ("gzip", whole[:-4] + b"\x00\x00\x00\x01", "body"),
    ):
        reply = http.post(path, data, Content_Encoding=encoding)
        assert (reply.status, reply.json["field"]) == (400, field), reply.json


def test_a_gzip_bomb_is_413_as_an_uncompressed_body_of_its_size(http: HttpClient) -> None:
    bomb = gzip.compress(bytes(65 << 20), compresslevel=1)
    reply = http.post("/v2/models/zeros/infer", bomb, Content_Encoding="gzip")
    assert (reply.status, reply.json["field"]) == (413, "body"), reply.json
    assert reply.json["error"].endswith("bytes after decompression, got 68157440")


def test_too_many_json_values_and_too_long_a_body_are_rejected(http: HttpClient) -> None:
    path = "/v2/models/zeros/infer"
    reply = http.post(path, b"[" + b"0," * 300_000 + b"0]")
    assert (reply.status, reply.json["code"]) == (413, "RESOURCE_EXHAUSTED")
    assert "send tensors as binary data" in reply.json["error"]
    many = good()
    many["inputs"][0]["shape"] = [100, 3, 32, 32]
    for one in many["inputs"]:
        del one["data"]
    contents = [bytes(4 * 307200), np.ones(1, "<f4").tobytes()]
    reply = post_binary(http, "/v2/models/gaussian/infer", many, contents)
    assert (reply.status, reply.json["field"]) == (400, "outputs"), reply.json
    many["parameters"] = {"binary_data_output": True}
    assert post_binary(http, "/v2/models/gaussian/infer", many, contents).status == 200


CHUNKED = (
    b"POST /v2/models/zeros/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
)
SENT: dict[str, tuple[bytes, bytes]] = {
    "a length beyond the limit": (
        b"POST /v2/models/zeros/infer HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 413",
    ),
    "garbage": (b"\x00\xff\x13garbage\r\n\r\n", b"HTTP/1.1 400"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"HTTP/1.1 400"),
    "two lengths": (
        b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 400",
    ),
    "a vast head in parts": (b"GET / HTTP/1.1\r\nX: " + b"x" * 300_000, b"HTTP/1.1 431"),
    "a chunk of a wrong size": (
        b"POST /v2/models/zeros/infer HTTP/1.1\r\nHost: localhost\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"",
    ),
    "trailers without end": (CHUNKED + b"0\r\n" + b"X: " + b"x" * 1_000_000, b""),
    "many trailers": (CHUNKED + b"0\r\n" + b"X: y\r\n" * 200_000, b""),
    "a vast extension of a chunk": (CHUNKED + b"1;" + b"x" * 1_000_000, b""),
    "bytes one by one": (CHUNKED + b"1\r\n \r\n" * 5_000, b""),
}


@pytest.mark.parametrize(("sent", "begins"), SENT.values(), ids=SENT)
def test_what_is_no_http_is_rejected_and_the_connection_closed(
    server: ServerProcess, sent: bytes, begins: bytes
) -> None:
    address = "127.0.0.1", server.ready["http_port"]
    with closing(socket.create_connection(address, TIMEOUT_S)) as connection:
        received = b""
        try:
            connection.sendall(sent)
            while part := connection.recv(65536):
                received += part
        except ConnectionError:
            pass  # closed before all of it was read
        assert received.startswith(begins) or not received


ANY: list[Any] = [
    *(None, True, 0, -1, 1.5, 2**70, "", "x", float("nan"), [], [1], [[1], [2, 3]], {}, {"a": 1}),
    *({"png": "AA=="}, {"png": []}, {"data": "AA=="}, "\ud800", [None], [[[]]], {"sigma": [1]}),
    {"dtype": "DTYPE_F32", "shape": [1, 1, 6, 5], "data": "AAAA"},
]
"""JSON of every type, and what resembles a field's."""


def test_no_arbitrary_fields_are_an_error_of_the_server(http: HttpClient) -> None:
    chance = random.Random(0)
    tensor = ["name", "datatype", "shape", "data", "parameters"]

    def fields(names: list[str], most: int) -> dict[str, Any]:
        chosen = chance.sample(names, chance.randint(0, most))
        return {name: chance.choice(ANY) for name in chosen}

    for number in range(200):
        name, request = (("denoise", QUERIES), ("sample", SAMPLES))[number % 2]
        of_message = next(iter(request.values())).request.DESCRIPTOR.fields_by_name
        options = ["sigma", "label", "image", "encoding", "resize", "noise_seed", "strength"]
        reply = http.post(f"/v1/models/zeros:{name}", fields([*of_message, *options], 4))
        assert reply.status in (200, 400, 404), reply.body
        body = {"inputs": [fields(tensor, 5), *good()["inputs"]], **fields(["outputs", "id"], 2)}
        reply = http.post("/v2/models/zeros/infer", body)
        assert reply.status == 400, reply.body
