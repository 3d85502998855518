"""Bad fields of ``/v1`` over HTTP: each is named, in the words of JSON."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.http_client import HttpClient

pytestmark = pytest.mark.usefixtures("unharmed")

V1: dict[str, tuple[Any, str]] = {
    "unknown field": ({"sigma": 1, "noise": 2}, "noise"),
    "sigma a string": ({"sigma": "much"}, "level.sigma"),
    "sigma beside level": ({"level": {"time": [0.5]}, "sigma": 1}, "level"),
    "label a fraction": ({"sigma": 1, "label": 0.5}, "labels"),
    "label an object": ({"sigma": 1, "label": {}}, "labels"),
    "x a number": ({"sigma": 1, "x": 1}, "x"),
    "data no base64": ({"sigma": 1, "x": {"data": "A*Q*I*D"}}, "x.data"),
    "data a number": ({"sigma": 1, "x": {"data": 3}}, "x.data"),
    "x no base64": ({"sigma": 1, "x": "%%%"}, "x"),
    "x no picture": ({"sigma": 1, "x": "QUJD"}, "x"),
    "no pictures": ({"sigma": 1, "x": []}, "x"),
    "too many pictures": ({"sigma": 1, "x": ["QUJD"] * 300}, "x"),
    "another model": ({"sigma": 1, "model": "local"}, "model"),
    "model a number": ({"sigma": 1, "model": 3}, "model"),
    "dtype unknown": ({"sigma": 1, "output_dtype": "f99"}, "output_dtype"),
    "encoding unknown": ({"sigma": 1, "encoding": "gif"}, "encoding"),
    "resize a number": ({"sigma": 1, "resize": 1}, "resize"),
    "noise seed negative": ({"sigma": 1, "noise_seed": -1}, "noise_seed"),
    "noise seed for a tensor": ({"sigma": 1, "x": {"data": ""}, "noise_seed": 1}, "noise_seed"),
    "resize of a tensor": ({"sigma": 1, "x": {"data": ""}, "resize": True}, "resize"),
    "strength elsewhere": ({"sigma": 1, "strength": 0.5}, "strength"),
    "label beside labels": ({"sigma": 1, "label": 1, "labels": [2]}, "labels"),
    "image beside x": ({"sigma": 1, "image": "QUJD", "x": "QUJD"}, "image"),
    "lone surrogate": (b'{"version": "\\ud800"}', "body"),
    "an array": ([1], "body"),
}


@pytest.mark.parametrize(("body", "field"), V1.values(), ids=V1)
def test_a_bad_body_of_denoise_is_rejected_and_the_field_named(
    http: HttpClient, body: Any, field: str
) -> None:
    reply = http.post("/v1/models/zeros:denoise", body)
    assert (reply.status, reply.json["field"]) == (400, field), reply.json


IN_WORDS: dict[str, tuple[Any, str]] = {
    "sigma an object": ({"sigma": {}}, "level.sigma: expected a number, got an object"),
    "sigma true": ({"sigma": True}, "level.sigma: expected a number, got true"),
    "sigma a string": ({"sigma": "much"}, 'level.sigma: expected a number, got "much"'),
    "sigma null in a list": ({"sigma": [None]}, "level.sigma: expected a number, got null"),
    "sigma NaN": ({"sigma": float("nan")}, "level.sigma: expected a finite number, got NaN"),
    "a level of others": ({"level": {"a": 1}}, "level.a: expected one of sigma, alpha_bar, time,"),
    "an array as level": ({"level": []}, "level: expected an object, got an array"),
    "x a number": (
        {"x": 5},
        "x: expected an object with dtype, shape and data, or a PNG file in base64, got 5",
    ),
    "x a list of numbers": ({"x": [5]}, "x: expected a PNG file in base64, got 5"),
    "x a damaged picture": ({"x": "iVBORw0KGgo" + "A" * 57}, "x: expected a PNG file, got a damag"),
    "dtype a fraction": (
        {"x": {"dtype": 1.5}},
        "x.dtype: expected one of DTYPE_UNSPECIFIED, DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_U8,"
        " got 1.5",
    ),
    "shape an object": ({"x": {"shape": {}}}, "x.shape: expected an array, got an object"),
    "label a fraction": ({"label": 0.5}, "labels: expected an integer of 64 bits, got 0.5"),
    "priority true": ({"priority": True}, "priority: expected an integer of 32 bits, got true"),
    "priority vast": (
        {"priority": 2**31},
        "priority: expected an integer of 32 bits, got 2",
    ),
    "evidence a number": (
        {"return_log_evidence": 1},
        "return_log_evidence: expected true or false, got 1",
    ),
    "encoding another": ({"encoding": "gif"}, 'encoding: expected base64 or png, got "gif"'),
    "model another": ({"model": "é"}, 'model: expected that of the path, or none, got "é"'),
}


@pytest.mark.parametrize(("body", "text"), IN_WORDS.values(), ids=IN_WORDS)
def test_wrong_values_are_named_in_the_words_of_json(
    http: HttpClient, body: Any, text: str
) -> None:
    level = {} if "level" in body else {"sigma": 1}
    reply = http.post("/v1/models/zeros:denoise", {**level, **body})
    assert reply.status == 400
    assert reply.json["error"].startswith(text), reply.json
    assert not {"None", "True", "dict", "list", "int()"} & set(reply.json["error"].split())


def test_null_stands_for_an_absent_field(http: HttpClient) -> None:
    body = {"steps": 2, "seed": 3}
    absent = dict.fromkeys(("labels", "label", "priority", "encoding", "strength", "start"))
    replies = [http.post("/v1/models/zeros:sample", each) for each in (body, body | absent)]
    assert replies[0].json == replies[1].json
    assert http.post("/v1/models/zeros:sample", {"nothing": None}).json["field"] == "nothing"


@pytest.mark.parametrize("more", [{}, {"strength": 0.5}, {"steps": 3}, {"image": None}])
def test_a_remix_without_a_picture_is_rejected(http: HttpClient, more: dict[str, Any]) -> None:
    reply = http.post("/v1/models/zeros:remix", more)
    assert (reply.status, reply.json["field"]) == (400, "image"), reply.json


@pytest.mark.parametrize("more", [{"start_time": 0.5}, {"times": [0.5, 0.1]}])
def test_a_strength_beside_the_times_that_it_stands_for_is_rejected(
    http: HttpClient, more: dict[str, Any]
) -> None:
    tensor = {"dtype": "DTYPE_F32", "shape": [1, 1, 6, 5], "data": "AAAA" * 40}
    reply = http.post("/v1/models/zeros:remix", {"start": tensor, "strength": 0.5, **more})
    assert (reply.status, reply.json["field"]) == (400, "strength"), reply.json
