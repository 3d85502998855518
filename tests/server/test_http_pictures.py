"""PNG files in requests: judged by their heads before one is decoded."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request

from els_service.config import Limits, Scheduling
from els_service.engine.registry import ModelRegistry
from els_service.errors import InvalidArgumentError, ResourceExhaustedError
from els_service.server.web import pictures
from els_service.server.web.app import application
from els_service.server.web.denoise_requests import Exchange, RequestConverter

GREY = (1, 4, 4)


def limited(pixels: int = 1 << 24) -> Limits:
    return Limits(max_images=64, max_steps=10, max_message_bytes=1 << 20, max_pixels=pixels)


def png(width: int = 4, height: int = 4) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width), np.uint8)).save(file, "PNG")
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def test_pictures_that_are_too_large_together_are_rejected_before_one_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was decoded")

    limits = limited(1000)
    assert pictures.tensor_of("x", [png()] * 3, GREY, limits, resize=False).shape == [3, 1, 4, 4]
    monkeypatch.setattr(Image, "open", opened)
    with pytest.raises(ResourceExhaustedError, match="x: expected at most 1000 pixels"):
        pictures.tensor_of("x", [png(20, 20)] * 3, GREY, limits, resize=True)


def test_a_second_head_with_another_size_is_rejected_before_its_pixels_are_decoded() -> None:
    file = png()
    end = file.index(b"IDAT") - 4
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 5_000, 4_000, 8, 0, 0, 0, 0))
    with pytest.raises(InvalidArgumentError, match="4x4, as its head says"):
        pictures.tensor_of("x", file[:end] + second + file[end:], GREY, limited(), resize=True)


def test_the_bytes_that_pictures_take_are_known_from_their_heads() -> None:
    def taken(value: Any, *, noisy: bool = False) -> int:
        return pictures.decoded_bytes({"sigma": 1, "x": value}, limited(), noisy=noisy)

    text = base64.b64encode(png(30, 20)).decode()
    assert taken(png(30, 20)) == taken(text) == taken(f"data:image/png;base64,{text}") == 8 * 600
    assert taken([text, text]) == taken({"png": [text, text]}) == 2 * 8 * 600
    assert taken(text, noisy=True) > 8 * 600
    assert taken([text] * 60_000) == 8 * 65 * 600  # as many as are counted before all are rejected
    for other in (0.5, [0.5], None, {}, {"png": None}, "%%%", text[:20], png()[:20], [text[:20]]):
        assert taken(other) == 0


@pytest.mark.parametrize(
    ("query", "body"),
    [("", '{{"image": "\\u0069{rest}"}}'), ("image=i{rest}", "")],
    ids=["escaped in JSON", "in the query"],
)
def test_pictures_are_counted_however_their_text_is_written(query: str, body: str) -> None:
    text = base64.b64encode(png(30, 20)).decode()
    scope = {
        "type": "http",
        "headers": [],
        "query_string": quote(query.format(rest=text[1:]), safe="=").encode(),
    }
    exchange = Exchange("denoise", Request(scope))
    converter = RequestConverter(ModelRegistry((), Scheduling(), print), limited())
    fields = converter.fields(exchange, body.format(rest=text[1:]).encode())
    assert fields == {"x": text}
    assert converter.decoded_bytes(exchange, fields) == 8 * 600


@pytest.mark.parametrize(
    ("headers", "closes"), [([(b"transfer-encoding", b"chunked")], True), ([], False)]
)
async def test_a_response_before_the_end_of_the_body_closes_the_connection(
    headers: list[tuple[bytes, bytes]], closes: bool
) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/none",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), *headers],
    }
    await application([], tokens=True, loopback=True)(scope, receive, send)
    assert sent[0]["status"] == 404
    assert ((b"connection", b"close") in sent[0]["headers"]) == closes
