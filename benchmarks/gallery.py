"""Draws the gallery: new, wider and tileable pictures from eight photographs of scikit-image.

    python -m benchmarks.gallery [NAME …]

Needs the extra ``gallery``. For each photograph one server is started, as ``els remix`` does, and
``docs/gallery`` gets a strip NAME.webp and its times; then ``docs/gallery.md`` is written from all
of them. Names of some photographs draw these alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import record
from els_client import Client
from els_client import _embedded as embedded
from els_client import _pictures as pictures

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "gallery"
PAGE = ROOT / "docs" / "gallery.md"
TIMES = FOLDER / "times.json"
MOST_BYTES = 1_500_000
"""Limit of all strips together."""
LONG_SIDE = 128
_WIDER = 1.5
_ZOOM, _GAP = 2, 8
_QUALITY = 88
_BACKGROUND = (255, 255, 255)


@dataclass(frozen=True)
class Photograph:
    """A photograph of ``skimage.data``, and what is drawn from it.

    Args:
        name: of the function that returns it.
        author: of the photograph.
        licence: words of its licence, which the function's docstring has.
        seen: what the strip shows.
        patch: side of a patch in pixels.
        seeds: of the new pictures, the wider and the tileable one.
        crop: part of it, left, top, right, bottom.
    """

    name: str
    author: str
    licence: str
    seen: str
    patch: int = 9
    seeds: tuple[int, int, int, int] = (1, 2, 1, 1)
    crop: tuple[int, int, int, int] | None = None


PHOTOGRAPHS = (
    Photograph(
        *("rocket", "SpaceX", "public domain"),
        "Rocket, towers and lamps stand in other places, some bent or cut off. The second new "
        "picture is close to the photograph. The tile has lost the ground: sky with pieces of "
        "towers.",
        seeds=(1, 2, 1, 2),
    ),
    Photograph(
        *("coffee", "Rachel Michetti", "CC0"),
        "The first new picture breaks cup and saucer into pieces, the second and the wider "
        "one have a wider cup. The tile is wood, more regular than in the photograph, with "
        "shards of the cup.",
        seeds=(1, 2, 1, 2),
    ),
    Photograph(
        *("hubble_deep_field", "NASA", "public domain"),
        "Clusters of stars in other places, each as it was. There are fewer faint stars: the "
        "mean of many patches is the black between them.",
        seeds=(1, 2, 1, 2),
    ),
    Photograph(
        *("chelsea", "Stéfan van der Walt", "CC0"),
        "A cat of many eyes: patches are known, faces are not. The wider picture keeps the "
        "face, as it starts from the photograph, and adds an eye at the right.",
    ),
    Photograph(
        *("brick", "CC0Textures", "CC0"),
        "Bricks of other lengths. Some joints bend or end where two parts of the wall meet, "
        "and the perspective of the photograph is gone.",
        patch=15,
        crop=(0, 0, 384, 256),
    ),
    Photograph(
        *("gravel", "CC0Textures", "CC0"),
        "Stones in another order; a bright group of them comes back in most pictures.",
        patch=15,
        crop=(0, 0, 384, 256),
    ),
    Photograph(
        *("grass", "linolafett", "CC0"),
        "Blades in another order; the light leaves come back whole, moved by some pixels.",
        patch=15,
        crop=(0, 0, 384, 256),
    ),
    Photograph(
        *("retina", "Mikael Häggström", "CC0"),
        "One dark spot becomes two or three, and thin vessels end in the open. The wider "
        "picture has the layout of the photograph.",
        crop=(200, 350, 1200, 1017),
    ),
)
DEMO = PHOTOGRAPHS[0]
DEMO_FILE = ROOT / "clients" / "examples" / "rocket.png"
DEMO_SIDE = 96


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw strips, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [one.name for one in PHOTOGRAPHS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    chosen = parser.parse_args(arguments).names or names
    if unknown := set(chosen) - set(names):
        parser.error(f"NAME: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    FOLDER.mkdir(exist_ok=True)
    for photograph in PHOTOGRAPHS:
        if photograph.name in chosen:
            if photograph == DEMO:
                photo_of(photograph, DEMO_SIDE).save(DEMO_FILE, optimize=True)
            strip, row = drawn(photograph)
            strip.save(FOLDER / f"{photograph.name}.webp", quality=_QUALITY, method=6)
            # After each: a run that is ended keeps what it drew.
            TIMES.write_text(json.dumps({**times(), photograph.name: row}, indent=1) + "\n")
            print(photograph.name, json.dumps(row), flush=True)
    PAGE.write_text(page(times()), encoding="utf-8")
    size = sum(file.stat().st_size for file in FOLDER.glob("*.webp"))
    if size > MOST_BYTES:
        raise SystemExit(f"gallery: expected at most {MOST_BYTES} bytes, got {size}")


def times() -> dict[str, Any]:
    """Return the rows of all strips, by name of the photograph."""
    known: dict[str, Any] = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    return {one.name: known[one.name] for one in PHOTOGRAPHS if one.name in known}


def photo_of(photograph: Photograph, long_side: int = LONG_SIDE) -> Image.Image:
    """Return the photograph, reduced to a long side.

    Raises:
        ValueError: scikit-image does not say that it has the licence.
    """
    from skimage import data

    load: Callable[[], np.ndarray] = getattr(data, photograph.name)
    if photograph.licence.lower() not in " ".join((load.__doc__ or "").split()).lower():
        raise ValueError(f"{photograph.name}: expected the licence {photograph.licence}")
    photo = Image.fromarray(load())
    if photograph.crop:
        photo = photo.crop(photograph.crop)
    factor = long_side / max(photo.size)
    size = round(factor * photo.width), round(factor * photo.height)
    return photo.resize(size, Image.Resampling.BOX)


def drawn(photograph: Photograph) -> tuple[Image.Image, dict[str, Any]]:
    """Return a strip (the photograph, two new pictures, a wider one, four tiles) and its times."""
    photo = photo_of(photograph)
    size = photo.height, photo.width
    first, second, wide, tile = photograph.seeds
    calls: dict[str, dict[str, Any]] = {
        "new": {"seed": first, "size": size},
        "another": {"seed": second, "size": size},
        "wider": {"seed": wide, "mode": "wider", "size": (size[0], round(_WIDER * size[1]))},
        "tileable": {"seed": tile, "mode": "tileable", "size": size},
    }
    keys: dict[str, int | str] = {
        "patch": photograph.patch,
        "finest": max(size),
        "source": photograph.name,
    }
    seconds: dict[str, float] = {}
    made: dict[str, Image.Image] = {}
    with embedded.serving(photo, keys) as target, Client(target) as client:
        for name, options in calls.items():
            began = time.perf_counter()
            image = client.remix(photo, model=embedded.NAME, **options)[0]
            seconds[name] = round(time.perf_counter() - began, 2)
            made[name] = pictures.to_picture(image)
    tiles = Image.new(photo.mode, (2 * photo.width, 2 * photo.height))
    for left in (0, photo.width):
        for top in (0, photo.height):
            tiles.paste(made["tileable"], (left, top))
    enlarged = [_enlarged(one) for one in (photo, made["new"], made["another"], made["wider"])]
    row = {
        "size": f"{size[1]}x{size[0]}",
        "wider": f"{round(_WIDER * size[1])}x{size[0]}",
        "patch": photograph.patch,
        "seeds": list(photograph.seeds),
        "seconds": seconds,
        "machine": "{cpu}, {cores} cores".format(**record.machine()),
    }
    return _strip([*enlarged, tiles]), row


def _enlarged(picture: Image.Image) -> Image.Image:
    size = _ZOOM * picture.width, _ZOOM * picture.height
    return picture.resize(size, Image.Resampling.NEAREST)


def _strip(row: Sequence[Image.Image]) -> Image.Image:
    """Return pictures of equal height side by side."""
    width = sum(picture.width for picture in row) + _GAP * (len(row) - 1)
    strip = Image.new("RGB", (width, row[0].height), _BACKGROUND)
    left = 0
    for picture in row:
        strip.paste(picture.convert("RGB"), (left, 0))
        left += picture.width + _GAP
    return strip


def page(rows: dict[str, Any]) -> str:
    """Return the page of all strips that there are."""
    shown = [one for one in PHOTOGRAPHS if one.name in rows]
    machines = " and ".join(sorted({rows[one.name]["machine"] for one in shown}))
    parts = [_HEAD.format(machines=machines, wider=_WIDER)]
    parts += [_section(one, rows[one.name]) for one in shown]
    licences = [f"| *{one.name}* | {one.author} | {one.licence} |" for one in shown]
    parts.append("\n".join([_LICENCES, *licences]))
    return "\n\n".join(parts) + "\n"


def _section(photograph: Photograph, row: dict[str, Any]) -> str:
    name, seconds = photograph.name, row["seconds"]
    alt = "From left: photograph, two new pictures, a wider one, four tiles"
    times = ", ".join(f"{seconds[key]:.1f}" for key in ("new", "another", "wider", "tileable"))
    seeds = ", ".join(map(str, row["seeds"]))
    settings = f"Size {row['size']}, wider {row['wider']}; patch {row['patch']}; seeds {seeds}"
    text = f"{photograph.seen} {settings}; {times} s."
    return f'## {name}\n\n<img src="gallery/{name}.webp" alt="{alt}.">\n\n{fill(text, 100)}'


_HEAD = """# Gallery

New pictures from one photograph each, without training: [models of kind
`picture`](models.md#kind-picture) and the sampler [`pyramid`](sampling.md#pictures). From left to
right: the photograph, two new pictures, a wider one ({wider} times), and four copies of a tileable
picture. Pixels are enlarged twice, those of the tiles are not. Other settings than patch and seed
are the defaults: 10 steps a scale, fold 0.2, and for wider strength 0.2. Seeds are the first that
were tried but for three tiles, whose seed 1 drew little but the background.

What is drawn is made of parts of the photograph, which keep their size and direction; what belongs
together beyond a patch is not known. Larger patches keep more: fine textures need them. With patch
9 and twice as many stones, gravel and grass were partly flat and grey, as the mean of many patches
is; with 15 and the crops below they are not. *hubble_deep_field* shows that loss.

Seconds are those of one call each, in the order of the strip, on {machines},
which other work shared. A strip is four commands such as

    els remix rocket.png --size 128x85 --seed 1
    els remix rocket.png --size 192x85 --seed 1 --mode wider
    els remix rocket.png --size 128x85 --seed 1 --mode tileable

`python -m benchmarks.gallery` (extra `gallery`) draws all of it and writes this page."""

_LICENCES = """## Licences

The photographs come with
[scikit-image](https://scikit-image.org/docs/stable/api/skimage.data.html), which states these
licences; the command checks that it does. Only the strips are here, and a small copy of *rocket* as
`clients/examples/rocket.png`, for `make demo`.

| photograph | author | licence |
|---|---|---|"""


if __name__ == "__main__":
    main()
