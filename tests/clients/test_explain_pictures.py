"""Maps and sheets of an explanation that was written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from els_client import Explanation
from els_client import _explain_pictures as drawing

HEIGHT, WIDTH = 3, 4
WHITE = [255, 255, 255]


def explanation(channels: int = 1) -> Explanation:
    """Left half from bank image 5, at the same place; right half from image 2, one to the right."""
    shape = (1, channels, HEIGHT, WIDTH)
    rows, columns = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    left = columns < WIDTH // 2
    sources = np.zeros((1, HEIGHT, WIDTH, 2, 3), np.int64)
    sources[0, :, :, 0] = np.stack(
        [np.where(left, 5, 2), rows, np.where(left, columns, (columns + 1) % WIDTH)], -1
    )
    sources[0, :, :, 1] = -1
    weights = np.zeros((1, HEIGHT, WIDTH, 2), np.float32)
    weights[..., 0] = 1
    shares = np.zeros((1, 7))
    shares[0, [5, 2]] = [0.75, 0.25]
    labels = np.full(7, -1)
    labels[[5, 2]] = [1, 0]
    return Explanation(
        denoised=np.full(shape, 0.5, np.float32),
        variance=np.zeros(shape, np.float32),
        entropy=np.linspace(0, 2, HEIGHT * WIDTH, dtype=np.float32).reshape(1, HEIGHT, WIDTH),
        sources=sources,
        weights=weights,
        shares=shares,
        dropped_share=np.zeros(1),
        labels=labels,
        label_names=("boot", "bag"),
        bank_fingerprint="ab",
        images=(
            {
                5: np.full(shape[1:], -0.5, np.float32),
                2: np.full(shape[1:], 1.0, np.float32),
            },
        ),
        file_names={5: "bags/five.png"},
    )


def test_what_was_taken_is_listed_by_falling_share_with_pixels_and_places() -> None:
    bag, boot = drawing.taken_from(explanation())
    assert (bag.image, bag.share, bag.label, bag.file) == (5, 0.75, "bag", "bags/five.png")
    assert (boot.image, boot.share, boot.label, boot.file) == (2, 0.25, "boot", "")
    assert np.array_equal(bag.pixels, [[True, True, False, False]] * HEIGHT)
    assert np.array_equal(bag.places, bag.pixels)
    assert np.array_equal(boot.places, [[True, False, False, True]] * HEIGHT)


def test_a_mosaic_has_one_colour_for_each_shown_bank_image() -> None:
    found = explanation()
    pixels = drawing.mosaic(found)
    assert pixels.dtype == np.uint8
    assert (pixels[:, :2] == drawing.PALETTE[0]).all()
    assert (pixels[:, 2:] == drawing.PALETTE[1]).all()
    del found.images[0][2]
    others = drawing.mosaic(found)[:, 2:]
    assert (others == others[0, 0]).all()
    assert others.max() <= 128
    # Without a clear source a pixel is dark.
    found.weights[..., 0] = 0
    quarter = np.rint(np.array(drawing.PALETTE[0]) / 4)
    assert (drawing.mosaic(found)[:, :2] == quarter).all()
    assert not drawing.taken_from(found)[0].pixels.any()


def test_displacement_is_white_at_the_same_place_and_wraps_where_the_image_does() -> None:
    pixels = drawing.displacement(explanation())
    assert (pixels[:, :2] == WHITE).all()
    # One to the right is red, pale beside three to the left; they are the same on a torus.
    assert pixels[0, 2].tolist() == [255, 170, 170]
    assert pixels[0, 3].tolist() == [0, 255, 255]
    wrapped = drawing.displacement(explanation(), wraps=True)
    assert (wrapped[:, 2:] == [255, 0, 0]).all()


def test_entropy_is_black_at_zero_and_pale_yellow_at_the_largest() -> None:
    pixels = drawing.entropy(explanation())
    assert pixels[0, 0].tolist() == [0, 0, 4]
    assert pixels[-1, -1].tolist() == [252, 255, 164]
    brightness = pixels.astype(int).sum(-1).ravel()
    assert (np.diff(brightness) > 0).all()
    certain = explanation()
    certain.entropy[:] = 0
    assert (drawing.entropy(certain) == [0, 0, 4]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_outlines_what_was_taken_in_the_colour_of_its_bank_image(channels: int) -> None:
    sheet = drawing.sheet(explanation(channels))
    pixels = np.asarray(sheet)
    factor = 168 // WIDTH
    assert sheet.mode == "RGB"
    tile = pixels[18 : 18 + factor * HEIGHT, 18 : 18 + factor * WIDTH]
    # A line inside each half, the picture between them.
    assert tile[factor, 0].tolist() == list(drawing.PALETTE[0])
    assert tile[factor, -1].tolist() == list(drawing.PALETTE[1])
    assert tile[factor, factor].tolist() == [191] * 3
    # Second row: image 5, of which the left half was taken, and the right half is dimmed.
    top = 18 + factor * HEIGHT + 2 * 16 + 14
    bank = pixels[top : top + factor * HEIGHT, 18 : 18 + factor * WIDTH]
    assert bank[factor, 0].tolist() == list(drawing.PALETTE[0])
    assert bank[factor, factor].tolist() == [64] * 3
    assert bank[factor, 3 * factor].tolist() == [26] * 3


def test_long_names_are_shortened_to_the_width_of_a_picture() -> None:
    found = explanation()
    found.file_names[5] = "folder/" * 30 + "end.png"
    assert drawing.sheet(found).size == drawing.sheet(explanation()).size


def test_large_pictures_keep_their_size() -> None:
    assert drawing.enlarged(np.zeros((200, 300, 3), np.uint8)).size == (300, 200)
    assert drawing.enlarged(np.zeros((28, 28, 3), np.uint8)).size == (168, 168)
    assert isinstance(drawing.enlarged(np.zeros((1, 1, 3), np.uint8)), Image.Image)
