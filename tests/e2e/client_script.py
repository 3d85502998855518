"""Uses all of the client and its commands; runs in other environments too, prints JSON.

usage: client_script.py HOST:PORT FOLDER
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from els_client import AsyncClient, Client, InvalidArgumentError, NotFoundError, Query

MODEL = "zeros"
PIXELS = np.linspace(-1, 1, 60, dtype=np.float32).reshape(2, 1, 6, 5)


def numbers(array: Any) -> list[float]:
    return [float(number) for number in np.asarray(array).ravel()]


def library(target: str) -> dict[str, Any]:
    level: dict[str, Any] = {"model": MODEL, "sigma": [0.5, 2.0], "label": [1, -1]}
    with Client(target) as client:
        queries = [Query(PIXELS[:1], model=MODEL, time=0.3), Query(PIXELS, **level)]
        steps = list(client.sample(model=MODEL, count=2, steps=3, seed=7, want=("x", "noise")))
        try:
            client.denoise(PIXELS, model=MODEL, sigma=-1.0)
        except InvalidArgumentError as error:
            refused = [(one.field, one.description) for one in error.violations]
        try:
            client.model("none")
        except NotFoundError as error:
            missing = str(error)
        return {
            "models": [repr(model.shape) + model.name for model in client.models()],
            "ready": [model.name for model in client.repository.index(ready=True)],
            "denoise": numbers(client.denoise(PIXELS, **level)),
            "half": numbers(client.denoise(PIXELS.astype(np.float16), **level)),
            "bytes": numbers(client.denoise((PIXELS * 100 + 120).astype(np.uint8), **level)),
            "evidence": [numbers(one) for one in client.denoise_with_evidence(PIXELS, **level)],
            "score": numbers(client.score(PIXELS, **level)),
            "many": [numbers(one) for one in client.denoise_many(queries)],
            "sample": [numbers(step.x) for step in steps] + [numbers(steps[0].noise)],
            "refused": refused,
            "missing": missing,
        }


async def asynchronous(target: str) -> dict[str, Any]:
    async with AsyncClient(target) as client:
        clean = await client.denoise(PIXELS, model=MODEL, sigma=0.5)
        steps = [step async for step in client.sample(model=MODEL, steps=2)]
        return {"denoise": numbers(clean), "sample": numbers(steps[-1].x)}


def commands(target: str, folder: Path) -> dict[str, Any]:
    picture = np.random.default_rng(0).integers(0, 256, (6, 5), np.uint8)
    Image.fromarray(picture).save(folder / "in.png")

    def els(*arguments: str) -> str:
        main = "from els_client.cli import main; main()"
        command = [sys.executable, "-c", main, "--target", target, *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=folder, check=False
        )
        return f"{done.returncode} {done.stderr.strip()}"

    level = ("--model", MODEL, "--sigma", "0.5")
    return {
        "models": els("models"),
        "denoise": els("denoise", "in.png", "out.png", *level),
        "score": els("score", "in.png", "score.npy", *level),
        "sample": els("sample", "--model", MODEL, "--count", "2", "--steps", "2", "--gif", "s.gif"),
        "missing": els("denoise", "in.png", "out.png", "--model", "none", "--sigma", "1"),
        "files": {
            name: digest(folder / name) for name in ("out.png", "grid.png", "s.gif", "score.npy")
        },
    }


def digest(file: Path) -> str:
    """Return the digest of the numbers in a file: encoders differ between versions."""
    array = np.load(file) if file.suffix == ".npy" else np.asarray(Image.open(file))
    return hashlib.sha256(array.tobytes()).hexdigest()


if __name__ == "__main__":
    address, where = sys.argv[1], Path(sys.argv[2])
    found = {
        "library": library(address),
        "asynchronous": asyncio.run(asynchronous(address)),
        "commands": commands(address, where),
    }
    print(json.dumps(found))
