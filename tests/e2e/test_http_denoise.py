"""JSON and PNG of ``denoise.v1`` over HTTP: for people with curl."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support.http_client import HttpClient, streamed

from els_client import Client

ZEROS = "/v1/models/zeros"


def png(pixels: Any) -> bytes:
    """Return uint8 pixels as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG")
    return file.getvalue()


def pixels_of(file: bytes) -> Any:
    """Return the pixels of a PNG file."""
    return np.asarray(Image.open(io.BytesIO(file)))


def as_bytes(values: Any) -> Any:
    """Return values of [-1, 1] as bytes."""
    return np.clip(np.rint((np.asarray(values) + 1) * 127.5), 0, 255).astype(np.uint8)


PICTURE = np.random.default_rng(0).integers(0, 256, (6, 5)).astype(np.uint8)
X = (PICTURE.astype(np.float32) / np.float32(127.5) - 1).reshape(1, 1, 6, 5)


TENSOR = {
    "dtype": "DTYPE_F32",
    "shape": X.shape,
    "data": base64.b64encode(X.tobytes()).decode(),
}


def test_a_picture_is_denoised_to_a_picture(http: HttpClient, client: Client) -> None:
    reply = http.post(f"{ZEROS}:denoise?sigma=0.5&label=1", png(PICTURE), Content_Type="image/png")
    assert (reply.status, reply.headers["content-type"]) == (200, "image/png")
    expected = client.denoise(X, model="zeros", sigma=0.5, label=1)
    np.testing.assert_array_equal(pixels_of(reply.body), as_bytes(expected[0, 0]))


def test_json_has_tensors_with_the_bits_of_grpc(http: HttpClient, client: Client) -> None:
    body = {"x": TENSOR, "sigma": 0.5, "labels": [2], "return_log_evidence": True}
    found = http.post(f"{ZEROS}:denoise", body).json
    denoised, evidence = client.denoise_with_evidence(X, model="zeros", sigma=0.5, label=2)
    for name, expected in (("denoised", denoised), ("log_evidence", evidence)):
        assert found[name]["shape"] == list(expected.shape)
        assert base64.b64decode(found[name]["data"]) == expected.tobytes()
    score = http.post(f"{ZEROS}:score", {"x": TENSOR, "sigma": 0.5}).json["score"]
    assert base64.b64decode(score["data"]) == client.score(X, model="zeros", sigma=0.5).tobytes()


def test_pictures_in_base64_and_as_data_urls_are_read(http: HttpClient) -> None:
    text = base64.b64encode(png(PICTURE)).decode()
    body = {"sigma": 0.5, "encoding": "png"}
    found = [
        http.post(f"{ZEROS}:denoise", {**body, "image": image}).json["denoised"]
        for image in (text, f"data:image/png;base64,{text}", {"png": text}, [text])
    ]
    assert all(one == found[0] for one in found)
    assert found[0]["shape"] == [1, 1, 6, 5]
    assert pixels_of(base64.b64decode(found[0]["png"][0])).shape == (6, 5)


def test_noise_of_a_seed_is_added_and_colour_and_size_are_fitted(http: HttpClient) -> None:
    large = np.random.default_rng(1).integers(0, 256, (60, 50, 3)).astype(np.uint8)
    path = f"{ZEROS}:denoise?sigma=0.5&resize=true&noise_seed="
    replies = [
        http.post(f"{path}{seed}", png(large), Content_Type="image/png") for seed in (1, 1, 2)
    ]
    assert [reply.status for reply in replies] == [200] * 3
    assert replies[0].body == replies[1].body != replies[2].body
    refused = http.post(f"{ZEROS}:denoise?sigma=1", png(large), Content_Type="image/png")
    assert (refused.status, refused.json["field"]) == (400, "x")


def test_a_sample_is_that_of_grpc_and_several_make_a_sheet(
    http: HttpClient, client: Client
) -> None:
    options: dict[str, Any] = {"steps": 4, "seed": 3, "sampler": "heun"}
    *_, last = client.sample(model="zeros", count=3, **options)
    expected = last.x
    assert expected is not None
    query = "&".join(f"{name}={value}" for name, value in options.items())
    sheet = pixels_of(http.post(f"{ZEROS}:sample?count=3&{query}", Accept="image/png").body)
    assert sheet.shape == (14, 12)
    np.testing.assert_array_equal(sheet[:6, :5], as_bytes(expected[0, 0]))
    np.testing.assert_array_equal(sheet[8:, :5], as_bytes(expected[2, 0]))
    found = http.post(f"{ZEROS}:sample", {**options, "count": 3}).json
    assert base64.b64decode(found["x"]["data"]) == expected.tobytes()
    assert (found["index"], found["total"]) == (4, 4)
    assert http.post(f"{ZEROS}:sample", {}).json["total"] == 20


def test_each_step_is_a_line_with_its_sources(http: HttpClient) -> None:
    body = {"steps": 3, "return_denoised": True, "explain_steps": [3], "encoding": "png"}
    with streamed(http.port, f"{ZEROS}:sample", body) as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        assert b'"index":1' in response.readline()
    reply = http.post(f"{ZEROS}:sample", body, Accept="application/x-ndjson")
    assert [line["index"] for line in reply.lines] == [1, 2, 3]
    assert all(line["denoised"]["png"] for line in reply.lines)
    (explained,) = reply.lines[2]["explanations"]
    sources = np.frombuffer(base64.b64decode(explained["sources"]), "<i4")
    assert sources.size == 6 * 5 * 8 * 3
    assert sources.max() < 12


def test_a_remix_starts_from_the_picture(http: HttpClient) -> None:
    def far(strength: float) -> float:
        path = f"{ZEROS}:remix?steps=10&strength={strength}"
        reply = http.post(path, png(PICTURE), Content_Type="image/png")
        assert reply.status == 200, reply.body
        return float(np.abs(pixels_of(reply.body).astype(float) - PICTURE).mean())

    assert far(0.01) < far(1.0)
    refused = http.post(f"{ZEROS}:remix?strength=0", png(PICTURE), Content_Type="image/png")
    assert refused.json["field"] == "strength"


def test_explanations_and_originality_are_lines(http: HttpClient) -> None:
    body = {"image": [base64.b64encode(png(PICTURE)).decode()] * 2, "sigma": 0.5}
    for method in ("explain", "originality"):
        lines = http.post(f"{ZEROS}:{method}", body).lines
        assert [line["index"] for line in lines] == [0, 1]
    refused = http.post("/v1/models/gaussian:explain", {"sigma": 1})
    assert (refused.status, refused.json["code"]) == (400, "FAILED_PRECONDITION")


@pytest.mark.parametrize("method", ["vjp", "jvp"])
def test_products_are_answered(http: HttpClient, method: str) -> None:
    along = {"vjp": "cotangent", "jvp": "tangent"}[method]
    found = http.post(f"{ZEROS}:{method}", {"x": TENSOR, "sigma": 1, along: TENSOR}).json
    assert found[method]["shape"] == [1, 1, 6, 5]


def test_models_are_listed_and_described_as_over_grpc(http: HttpClient, client: Client) -> None:
    listed = {model["name"]: model for model in http.get("/v1/models").json["models"]}
    assert sorted(listed) == sorted(model.name for model in client.models())
    described = http.get("/v1/models/zeros").json
    assert described == http.get("/v1/models/zeros/versions/1").json == listed["zeros"]
    assert (described["height"], described["width"], described["label_count"]) == (6, 5, 3)
