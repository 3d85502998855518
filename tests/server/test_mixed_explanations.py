"""Explanations over banks of images of several sizes, as messages, in the client, and drawn."""

from __future__ import annotations

import numpy as np
import pytest

from els_client import _explain_pictures as drawing
from els_client._moments import decode_explanation
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.denoisers.analytic import bank_info
from els_service.denoisers.base import DenoiserInfo
from els_service.denoisers.explanations import Explanation
from els_service.denoisers.mixed_banks import MixedBank, make_mixed_bank
from els_service.server.requests.explanations import Detail, explanation_size, write_explanation

QUERY = (1, 3, 4)


def mixed() -> MixedBank:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (1, *size), np.uint8) for size in [(5, 6), (2, 9), (5, 6)]]
    bank = make_mixed_bank(images, file_names=["a.png", "b.png", "c.png"])
    assert isinstance(bank, MixedBank)
    return bank


def explanation(bank: MixedBank) -> Explanation:
    """Return one whose pixels come from image 0, 2 rows high, but for one from the last."""
    _, height, width = QUERY
    sources = np.zeros((1, height, width, 1, 3), np.int64)
    sources[..., 1] = np.arange(height).clip(max=1)[:, None, None]
    sources[..., 2] = np.arange(width)[:, None]
    sources[0, 0, 0, 0] = 2, 4, 5
    return Explanation(
        np.zeros((1, *QUERY), np.float32),
        None,
        np.zeros((1, *QUERY), np.float32),
        np.zeros((1, height, width), np.float32),
        sources,
        np.ones((1, height, width, 1), np.float32),
        np.array([[0.75, 0.0, 0.25]]),
        bank,
    )


@pytest.fixture
def message() -> pb.ExplainResponse:
    bank = mixed()
    info = DenoiserInfo(kind="analytic", shape=bank.shape, bank=bank_info(bank))
    written = write_explanation(0, explanation(bank), detail := Detail(1, 2), info)
    assert written.ByteSize() <= explanation_size(QUERY, detail, info) + 256
    return written


def test_bank_images_have_their_own_size_in_the_message_and_in_the_client(
    message: pb.ExplainResponse,
) -> None:
    assert not message.HasField("images")
    assert [list(image.shape) for image in message.sized_images] == [[1, 1, 2, 9], [1, 1, 5, 6]]
    bank, found = mixed(), decode_explanation([message], 1)
    assert list(found.images[0]) == [0, 2]
    for index, pixels in found.images[0].items():
        np.testing.assert_array_equal(pixels, bank.image(index))
    assert found.file_names == {0: "b.png", 2: "c.png"}
    assert found.image_sizes.tolist() == [[2, 9], [-1, -1], [5, 6]]


def test_a_sheet_shows_bank_images_of_several_sizes_with_what_was_taken_from_each(
    message: pb.ExplainResponse,
) -> None:
    found = decode_explanation([message], 1)
    wide, last = drawing.taken_from(found)
    assert (wide.places.shape, int(wide.places[:, :4].sum())) == ((2, 9), 7)
    assert (last.places.shape, last.places[4, 5], int(last.places.sum())) == ((5, 6), True, 1)
    sheet = drawing.sheet(found)
    panels = [drawing.enlarged_picture(one.values).size for one in (wide, last)]
    assert sheet.width > 4 * max(width for width, _ in panels)


def test_displacements_wrap_by_the_sides_of_the_bank_image_of_each_source(
    message: pb.ExplainResponse,
) -> None:
    found = decode_explanation([message], 1)
    # Row 2 of the query is row 0 of image 0, which has two rows; and image 2 wraps by 5 and 6.
    found.sources[0, 2, :, 0, 1] = 0
    pixels = drawing.displacement(found, wraps=True)
    assert (pixels[1:] == 255).all()
    assert (pixels[0, 1:] == 255).all()
    found.sources[0, 0, 0, 0] = 2, 0, 0
    assert (drawing.displacement(found, wraps=True) == 255).all()
