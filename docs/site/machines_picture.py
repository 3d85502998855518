"""Draws docs/machines.png: one picture at four noise levels, denoised by each bundled machine.

python docs/site/machines_picture.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from els_client.torch import LocalClient
from els_service.denoisers.banks import load_bank
from els_service.repository import bundled_models

OUT = Path(__file__).parents[1] / "machines.png"
LABEL, SIDE, ZOOM, GAP, HEAD, LEFT = 7, 28, 3, 8, 16, 56
LEVELS = (0.2, 0.5, 1.0, 3.0)
COLUMNS = {
    "ideal": "fashion-ideal",
    "local": "fashion-local",
    "ELS": "fashion-els",
    "Wiener": "fashion-wiener",
    "network": "fashion-resnet",
}


def picture() -> np.ndarray:
    """Return a picture [1, 1, H, W] in [-1, 1] that no bank has: a sneaker with another's sole."""
    bank = load_bank(bundled_models() / "_banks" / "fashion-mnist-5000.safetensors")
    upper, sole = bank.pixels()[bank.labels == LABEL][[3, 11]]
    return np.concatenate([upper[:, :17], sole[:, 17:]], 1)[None]


def main() -> None:
    """Write the picture."""
    clean = picture()
    clients = {name: LocalClient(bundled_models() / model) for name, model in COLUMNS.items()}
    noise = np.random.default_rng(0).normal(size=clean.shape)
    step = SIDE * ZOOM + GAP
    size = (LEFT + step * (2 + len(COLUMNS)), HEAD + step * len(LEVELS))
    sheet = Image.new("L", size, 255)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(["clean", "noisy", *COLUMNS]):
        draw.text((LEFT + column * step, 2), name, 0)
    for row, sigma in enumerate(LEVELS):
        noisy = clean + sigma * noise
        draw.text((2, HEAD + row * step + SIDE), f"sigma {sigma:g}", 0)
        found = [
            client.denoise(noisy, model=client.name, sigma=sigma, label=LABEL)
            for client in clients.values()
        ]
        for column, image in enumerate([clean, noisy / (1 + sigma / 2), *found]):
            pixels = np.clip(127.5 * (image[0, 0] + 1), 0, 255).astype(np.uint8)
            tile = Image.fromarray(pixels).resize((SIDE * ZOOM,) * 2, Image.Resampling.NEAREST)
            sheet.paste(tile, (LEFT + column * step, HEAD + row * step))
    sheet.save(OUT, optimize=True)


if __name__ == "__main__":
    main()
