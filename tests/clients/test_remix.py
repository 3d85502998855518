"""``remix`` of both clients: requests that are sent, and inputs that are rejected before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support.fake_pictures import FakePictures
from tests.support.fake_server import served
from tests.support.twin import Twin

from els_client import AsyncClient, Client, InvalidArgumentError
from els_proto.denoise.v1 import denoise_pb2 as pb

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
FLOATS = (PIXELS.transpose(2, 0, 1) / 127.5 - 1).astype(np.float32)
MASK = np.zeros((8, 12), bool)
MASK[2:5, 3:9] = True


@pytest.fixture
def fake() -> FakePictures:
    return FakePictures()


@pytest.fixture
def target(fake: FakePictures) -> Iterator[str]:
    with served(fake) as address:
        yield address


async def request(twin: Twin, fake: FakePictures, *given: Any, **options: Any) -> pb.SampleRequest:
    """Return the request for some pictures, whose shape is checked."""
    images = await twin.call("remix", *given, model="street", **options)
    (sent,) = (one for one in fake.requests if isinstance(one, pb.SampleRequest))
    assert images.shape == (sent.count, 3, sent.height, sent.width)
    assert (sent.sampler, sent.model) == (pb.SAMPLER_PYRAMID, "street")
    return sent


def values(tensor: pb.Tensor) -> np.ndarray:
    dtype = "u1" if tensor.dtype == pb.DTYPE_U8 else "<f4"
    return np.frombuffer(tensor.data, dtype).reshape(tuple(tensor.shape))


@pytest.mark.parametrize("mode", ["new", "tileable", "symmetric"])
async def test_modes_of_no_start_send_a_size_and_a_flag(
    twin: Twin, fake: FakePictures, mode: str
) -> None:
    sent = await request(twin, fake, PIXELS, mode=mode, count=2, seed=7, size=(9, 30))
    assert (sent.height, sent.width, sent.count, sent.seed) == (9, 30, 2, 7)
    assert (sent.tileable, sent.symmetric) == (mode == "tileable", mode == "symmetric")
    assert not sent.HasField("start")
    assert not sent.HasField("mask")
    assert sent.start_time == 0


async def test_the_default_size_is_that_of_the_model(twin: Twin, fake: FakePictures) -> None:
    sent = await request(twin, fake)
    assert (sent.height, sent.width) == (8, 12)


@pytest.mark.parametrize(("mode", "size"), [("wider", (8, 18)), ("taller", (12, 12))])
async def test_a_retargeted_photograph_is_stretched_to_the_size(
    twin: Twin, fake: FakePictures, mode: str, size: tuple[int, int]
) -> None:
    sent = await request(twin, fake, PIXELS, mode=mode)
    assert (sent.height, sent.width) == size
    assert sent.start_time == pytest.approx(0.2)
    expected = np.asarray(Image.fromarray(PIXELS).resize(size[::-1]))
    np.testing.assert_array_equal(values(sent.start)[0], expected.transpose(2, 0, 1))


@pytest.mark.parametrize(
    "picture",
    [PIXELS, Image.fromarray(PIXELS), FLOATS, FLOATS.astype(np.float64)],
    ids=["bytes", "Pillow", "float32", "float64"],
)
async def test_a_variation_starts_from_the_same_pixels_of_any_kind(
    twin: Twin, fake: FakePictures, picture: Any
) -> None:
    sent = await request(twin, fake, picture, mode="variation", strength=0.3)
    assert sent.start_time == pytest.approx(0.3)
    start = values(sent.start)
    if start.dtype == np.uint8:
        start = start / 127.5 - 1
    np.testing.assert_allclose(start[0], FLOATS, atol=1e-6)


async def test_a_grey_photograph_is_drawn_in_the_colours_of_the_model(
    twin: Twin, fake: FakePictures
) -> None:
    sent = await request(twin, fake, PIXELS[..., 0], mode="variation")
    np.testing.assert_array_equal(values(sent.start)[0], np.stack([PIXELS[..., 0]] * 3))


async def test_floats_keep_their_range_when_they_are_resampled(
    twin: Twin, fake: FakePictures
) -> None:
    sent = await request(twin, fake, np.full((3, 16, 24), 0.25), mode="variation")
    assert list(sent.start.shape) == [1, 3, 8, 12]
    np.testing.assert_allclose(values(sent.start), 0.25, atol=1e-6)


@pytest.mark.parametrize(
    "mask",
    [MASK, MASK.astype(float), MASK.astype(np.uint8) * 255, Image.fromarray(MASK)],
    ids=["booleans", "floats", "bytes", "Pillow"],
)
async def test_inpainting_draws_the_pixels_of_the_mask(
    twin: Twin, fake: FakePictures, mask: Any
) -> None:
    sent = await request(twin, fake, PIXELS, mode="inpaint", mask=mask)
    np.testing.assert_array_equal(values(sent.mask)[0, 0], MASK)
    np.testing.assert_array_equal(values(sent.start)[0], PIXELS.transpose(2, 0, 1))
    assert sent.start_time == 0


async def test_photograph_and_mask_are_resampled_alike(twin: Twin, fake: FakePictures) -> None:
    large = PIXELS.repeat(4, 0).repeat(4, 1)
    sent = await request(twin, fake, large, mode="inpaint", mask=MASK.repeat(4, 0).repeat(4, 1))
    np.testing.assert_array_equal(values(sent.mask)[0, 0], MASK)


async def test_an_edit_starts_from_the_sketch(twin: Twin, fake: FakePictures) -> None:
    sketch = PIXELS[::-1]
    sent = await request(twin, fake, PIXELS, mode="edit", start=sketch, mask=MASK)
    np.testing.assert_array_equal(values(sent.start)[0], sketch.transpose(2, 0, 1))
    assert sent.start_time == pytest.approx(0.3)
    np.testing.assert_array_equal(values(sent.mask)[0, 0], MASK)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model": "rgb"}, "model: expected one of kind picture"),
        ({"mode": "bigger"}, "mode: expected one of new, wider"),
        ({"mode": "wider"}, "picture: expected one for mode wider, got none"),
        ({"mode": "inpaint", "picture": PIXELS}, "mask: expected one for mode inpaint"),
        ({"mode": "edit"}, "start: expected one for mode edit"),
        ({"strength": 0.5}, "strength: expected none for mode new (for wider, taller"),
        ({"mask": MASK}, "mask: expected none for mode new (for inpaint, edit)"),
        ({"mode": "variation", "picture": PIXELS, "start": PIXELS}, "start: expected none for"),
        ({"mode": "variation", "picture": PIXELS, "strength": 0}, "strength: expected 0 < "),
        ({"mode": "variation", "picture": PIXELS, "strength": 1.5}, "strength: expected 0 < "),
        ({"mode": "wider", "picture": PIXELS, "size": (8, 12)}, "size: expected wider proportions"),
        ({"mode": "taller", "picture": PIXELS, "size": (8, 13)}, "size: expected taller prop"),
        ({"size": (2, 12)}, "size: expected a height of 3 to 128 pixels, got 2"),
        ({"size": (8, 129)}, "size: expected a width of 3 to 128 pixels, got 129"),
        ({"size": (128, 128), "count": 4}, "size: expected at most 100000 numbers"),
        ({"size": (8.5, 12)}, "size: expected an integer"),
        ({"count": 5}, "count: expected at most 4, got 5"),
        ({"steps": 1}, "steps: expected 2 to 20 for each scale, got 1"),
        ({"steps": 21}, "steps: expected 2 to 20 for each scale, got 21"),
        (
            {"mode": "inpaint", "picture": PIXELS, "mask": MASK[:, :11]},
            "mask: expected 12x8 pixels, the size of picture, got 11x8",
        ),
        (
            {"mode": "inpaint", "picture": PIXELS, "mask": np.zeros((8, 12))},
            "mask: expected pixels to draw",
        ),
        (
            {"mode": "inpaint", "picture": PIXELS, "mask": MASK[None]},
            "mask: expected shape [H, W], got shape [1, 8, 12]",
        ),
        (
            {"mode": "edit", "picture": PIXELS, "start": PIXELS[1:]},
            "start: expected 12x8 pixels, the size of picture, got 12x7",
        ),
        (
            {"mode": "edit", "start": PIXELS, "mask": MASK[1:]},
            "mask: expected 12x8 pixels, the size of start, got 12x7",
        ),
        (
            {"mode": "variation", "picture": PIXELS.astype(np.int16)},
            "picture: expected uint8 of shape [H, W] or [H, W, 3]",
        ),
        (
            {"mode": "variation", "picture": FLOATS[:2]},
            "picture: expected 3 channels, those of the model, got 2",
        ),
        (
            {"mode": "variation", "picture": Image.new("RGBA", (4, 4))},
            "picture: expected a picture of mode L or RGB, without transparency, got RGBA",
        ),
    ],
)
async def test_wrong_inputs_are_rejected_before_the_call(
    twin: Twin, fake: FakePictures, options: dict[str, Any], reason: str
) -> None:
    given = {"model": "street", **options}
    with pytest.raises(InvalidArgumentError) as caught:
        await twin.call("remix", given.pop("picture", None), **given)
    assert reason in str(caught.value)
    assert caught.value.violations
    assert not [one for one in fake.requests if isinstance(one, pb.SampleRequest)]


async def test_previews_have_the_size_of_their_scale(
    target: str, kind: type[Client] | type[AsyncClient], fake: FakePictures
) -> None:
    client = kind(target)
    if isinstance(client, Client):
        steps = list(client.remix_steps(model="street", size=(16, 24), steps=2))
        client.close()
    else:
        steps = [one async for one in client.remix_steps(model="street", size=(16, 24), steps=2)]
        await client.close()
    shapes = [(step.scale, step.denoised.shape[2:]) for step in steps]
    assert shapes == [(0, (8, 12))] * 2 + [(1, (16, 24))] * 2
    assert steps[-1].x.shape == (1, 3, 16, 24)
