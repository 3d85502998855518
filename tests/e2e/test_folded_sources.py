"""Sources and products of models with a fold, and of queries of another size, by brute force."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.folded_models import LARGE, SIGMA, images, mixed_bank
from tests.support.models_folder import SHAPE, tiny_bank
from tests.support.processes import ServerProcess
from tests.support.twin import Twin
from typer.testing import CliRunner, Result

from els_client import (
    Client,
    Evidence,
)
from els_client.cli import app
from els_kernels import FOLD_GEOMETRIES
from els_kernels.reference_fold_statistics import ReferenceFoldPosterior


@pytest.fixture(scope="module")
def server(folded_server: ServerProcess) -> ServerProcess:
    return folded_server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.target, timeout_s=60) as client:
        yield client


SOURCES = [
    ("folded", SHAPE[1:]),
    ("folded", LARGE),
    ("sized", LARGE),
    ("sized", (4, 3)),
    ("inside", SHAPE[1:]),
    ("local", SHAPE[1:]),
]
"""Models with queries of sizes that they answer."""


def references(client: Client, name: str, x: np.ndarray[Any, Any]) -> list[ReferenceFoldPosterior]:
    """Return the specification of each image."""
    model, bank = client.model(name), list(tiny_bank().pixels())
    geometry = FOLD_GEOMETRIES[model.machine, model.padding]
    return [
        ReferenceFoldPosterior(image, bank, 1.0, sigma, 3, model.fold, geometry)
        for image, sigma in zip(torch.from_numpy(x), SIGMA, strict=True)
    ]


def close(got: np.ndarray[Any, Any], want: torch.Tensor, slack: float = 1e-5) -> bool:
    return bool(np.abs(got - want.numpy()).max() <= slack * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize(("model", "size"), SOURCES)
def test_an_explanation_is_that_of_brute_force(
    client: Client, model: str, size: tuple[int, int]
) -> None:
    x = images(size)
    found = client.explain(x, model=model, sigma=SIGMA, top=16, images=2)
    assert found.sources.shape == (2, *size, 16, 3)
    assert found.shares.sum(1) == pytest.approx(np.ones(2), abs=1e-6)
    assert [pixels.shape for pixels in found.images[1].values()] == [SHAPE] * 2
    for b, reference in enumerate(references(client, model, x)):
        assert close(found.denoised[b], reference.mean())
        assert close(found.variance[b], reference.variance())
        assert close(found.entropy[b], reference.entropy(), 1e-4)
        assert close(found.shares[b], reference.shares())
        every = torch.stack(reference.weights(), 1)
        largest = every.flatten(1).sort(descending=True).values[:, :16]
        given = found.weights[b].reshape(len(largest), 16)[:, : largest.shape[1]]
        assert close(given, largest)
        for place, sources in enumerate(found.sources[b].reshape(len(largest), 16, 3)):
            image, row, col = sources[0].tolist()
            weight = float(every[place, image, row * SHAPE[2] + col])
            assert given[place, 0] == pytest.approx(weight, abs=1e-5)


@pytest.mark.parametrize(("model", "size"), SOURCES)
def test_products_and_variance_are_those_of_brute_force(
    client: Client, model: str, size: tuple[int, int]
) -> None:
    x, g = images(size), images(size, 2)
    options: dict[str, Any] = {"model": model, "sigma": SIGMA}
    evidence = Evidence()
    denoised, pulled = client.vjp(x, g, evidence=evidence, **options)
    same, pushed = client.jvp(x, g, **options)
    assert np.array_equal(denoised, same)
    assert not evidence.data
    plain, variance = client.denoise_with_variance(x, **options)
    assert np.array_equal(plain, client.denoise(x, **options))
    for b, reference in enumerate(references(client, model, x)):
        assert close(denoised[b], reference.mean())
        assert close(pulled[b], reference.vjp(torch.from_numpy(g[b])), 1e-4)
        assert close(pushed[b], reference.jvp(torch.from_numpy(g[b])), 1e-4)
        assert close(variance[b], reference.variance())


def test_sources_in_a_bank_of_several_sizes_have_the_coordinates_of_their_image(
    client: Client,
) -> None:
    x, bank = images(LARGE), mixed_bank()
    pixels = [torch.from_numpy(bank.image(index)) for index in range(len(bank))]
    found = client.explain(x, model="mixed", sigma=SIGMA, top=4, images=3)
    geometry = FOLD_GEOMETRIES["els", "zeros"]
    for b, sigma in enumerate(SIGMA):
        one = torch.from_numpy(x[b])
        want = ReferenceFoldPosterior(one, pixels, 1.0, sigma, 3, 0.5, geometry)
        assert close(found.denoised[b], want.mean())
        assert close(found.variance[b], want.variance())
        assert close(found.shares[b], want.shares())
        weights = want.weights()
        sources = found.sources[b].reshape(-1, 4, 3)
        for place, listed in enumerate(found.weights[b].reshape(-1, 4)):
            for weight, (image, row, col) in zip(listed, sources[place].tolist(), strict=True):
                exact = weights[image][place, row * pixels[image].shape[2] + col]
                assert weight == pytest.approx(float(exact), abs=1e-5)
        assert len(found.images[b]) == 3
        for index, values in found.images[b].items():
            assert np.array_equal(values, bank.image(index))


def test_els_explain_draws_bank_images_of_their_own_sizes(
    server: ServerProcess, tmp_path: Path
) -> None:
    words = ["explain", "--seed", "0", "--steps", "2", "--model", "mixed", "--json"]
    out = tmp_path / "why"
    result = CliRunner().invoke(app, [*words, "--out", str(out), "--target", server.target])
    assert result.exit_code == 0, result.output
    assert {one["image"] for one in json.loads(result.output)["bank_images"]} <= {0, 1, 2, 3}
    with Image.open(out / "sheet.png") as sheet:
        assert min(sheet.size) > 100


def test_the_commands_explain_and_compare_pictures_of_another_size(
    server: ServerProcess, client: Client, tmp_path: Path
) -> None:
    picture = tmp_path / "in.png"
    pixels = np.random.default_rng(3).integers(0, 256, LARGE).astype(np.uint8)
    Image.fromarray(pixels).save(picture)
    out, drawn = ("--out", str(tmp_path / "why")), ("--seed", "2", "--steps", "2", "--size", "9x14")

    def asked(*words: str, model: str = "mixed") -> Result:
        common = ("--model", model, "--json", "--target", server.target)
        return CliRunner().invoke(app, [*words, *common])

    read = json.loads(asked("explain", str(picture), "--sigma", "1", *out).output)
    found = client.explain(pixels[None, None], model="mixed", sigma=1.0)
    assert read["entropy"] == pytest.approx(float(found.entropy.mean()))
    compared = json.loads(asked("originality", str(picture)).output)
    (report,) = client.originality(pixels[None, None], model="mixed")
    assert compared["seams"] == report.seams
    *_, last = client.sample(
        model="mixed", seed=2, steps=2, size=LARGE, explain_steps=[2], originality=True
    )
    sampled = json.loads(asked("explain", *drawn, *out).output)
    assert sampled["entropy"] == pytest.approx(float(last.explanation.entropy.mean()))
    sampled = json.loads(asked("originality", *drawn).output)
    assert sampled["largest_region"] == last.originality[0].largest_region
    swept = json.loads(asked("sweep", str(tmp_path / "sheet.png"), *drawn).output)
    assert swept["pictures"][0]["largest_region"] == last.originality[0].largest_region
    for words in (("explain", *drawn, *out), ("originality", *drawn)):
        refused = asked(*words, model="plain")
        assert refused.exit_code == 2
        assert "size: expected none, as plain has 6x5 alone, got 9x14" in refused.output
    refused = asked("originality", str(picture), model="plain")
    assert "the model takes 5 × 6: pass --resize" in " ".join(refused.output.split())


def test_queries_of_the_banks_size_have_the_sources_of_the_model_without_sizes(
    client: Client,
) -> None:
    x, g = images(), images(seed=2)
    plain, sized = (client.explain(x, model=name, sigma=SIGMA) for name in ("plain", "sized"))
    assert np.array_equal(plain.sources, sized.sources)
    assert np.array_equal(plain.weights, sized.weights)
    first, second = (client.vjp(x, g, model=name, sigma=SIGMA)[1] for name in ("plain", "sized"))
    assert np.array_equal(first, second)


def test_products_of_many_sizes_at_once_have_the_bits_that_they_have_alone(client: Client) -> None:
    asked = [images(size, seed) for seed, size in enumerate([LARGE, (4, 3), SHAPE[1:], LARGE] * 2)]

    def product(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return client.vjp(x, x, model="folded", sigma=SIGMA)[1]

    alone = list(map(product, asked))
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(product, asked))
    for one, same in zip(alone, together, strict=True):
        assert np.array_equal(one, same)


async def test_a_step_of_a_sample_of_another_size_is_explained_and_reported(twin: Twin) -> None:
    options: dict[str, Any] = {"model": "folded", "steps": 3, "size": LARGE}
    steps = await twin.steps(explain_steps=[3], explain_top=2, originality=True, **options)
    found = steps[-1].explanation
    assert found.sources.shape == (1, *LARGE, 2, 3)
    assert np.abs(found.denoised - steps[-1].denoised).max() <= 1e-5
    (report,) = steps[-1].originality
    assert report.gap_ratio is None
    assert report.absent["gap_ratio"] == "needs a bank of images of its size, 1×9×14"
    assert report.largest_region is not None
    assert 0 < report.largest_region <= 1


async def test_an_image_of_the_bank_is_one_region_at_its_place(twin: Twin) -> None:
    x = tiny_bank().pixels()[4:5].numpy()
    for model in ("folded", "inside", "local"):
        (found,) = await twin.call("originality", x, model=model, nearest=1)
        assert found.nearest.tolist() == [4]
        assert (found.largest_image, found.memorised) == (4, True)
        assert found.in_place == pytest.approx(1)
