"""Sample from a start, at chosen times, on the folder's timesteps and with guidance by label."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.models_folder import SHAPE, write_models
from tests.support.pretrained import SHAPE as CLASSES
from tests.support.pretrained import scheduler, unet, write_folder
from tests.support.processes import ServerProcess, run, serving

from els_client import Client, InvalidArgumentError
from els_client._pictures import write_grid
from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.samplers import SAMPLERS, options_for, sample
from els_service.repository import ModelRepository

START = np.random.default_rng(5).uniform(-1, 1, (2, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_models(tmp_path_factory.mktemp("options") / "models", {})
    (root / "zeros").mkdir()
    document = "kind: analytic\nmachine: els\nbank: ../_banks/tiny.safetensors\n"
    (root / "zeros" / "model.yaml").write_text(document)
    fields = {"clip_sample": True, "timestep_spacing": "leading", "steps_offset": 1}
    parts = {"unet": unet(num_class_embeds=4), "scheduler": scheduler(**fields)}
    write_folder(root / "classes", "kind: diffusers\nnull_label: true\n", **parts)
    return root


@pytest.fixture(scope="module")
def process(root: Path) -> Iterator[ServerProcess]:
    with serving("--models", root, "--threads", 1) as process:
        yield process


@pytest.fixture(scope="module")
def client(process: ServerProcess) -> Iterator[Client]:
    with Client(process.target, timeout_s=60) as client:
        yield client


@pytest.fixture(scope="module")
def library(root: Path) -> dict[str, Denoiser]:
    repository = ModelRepository(root)
    return {name: repository.load(name) for name in repository.names()}


def drawn(client: Client, **options: Any) -> np.ndarray:
    defaults: dict[str, Any] = {"model": "zeros", "steps": 4, "seed": 6, "count": 2}
    *_, last = client.sample(**defaults | options)
    return last.x


def of_the_library(denoiser: Denoiser, sampler: str, first: int = 0, **options: Any) -> np.ndarray:
    chosen = options_for(denoiser.info, **{"steps": 4} | options)
    how: dict[str, Any] = {"count": 2, "seed": 6, "first": first, "sampler": sampler}
    *_, last = sample(denoiser, **how, options=chosen)
    return last.x.float().numpy()


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"ddim_released"}))
def test_a_start_and_times_draw_the_bits_of_the_library(
    client: Client, library: dict[str, Denoiser], sampler: str
) -> None:
    start = torch.from_numpy(START.astype(np.float64))
    options: dict[str, Any] = {"start": start, "start_time": 0.4}
    want = of_the_library(library["zeros"], sampler, **options)
    got = drawn(client, sampler=sampler, start=START, start_time=0.4)
    assert got.tobytes() == want.tobytes()
    times = (0.8, 0.35, 0.1)
    want = of_the_library(library["zeros"], sampler, first=3, steps=3, times=times)
    got = drawn(client, sampler=sampler, times=times, steps=None, first_image=3)
    assert got.tobytes() == want.tobytes()


def test_a_start_noised_a_little_comes_back_and_noised_fully_is_forgotten(client: Client) -> None:
    # The level of the first step is that of the start: the nearer to 0, the nearer to the start.
    near, far = (drawn(client, start=START, start_time=time) for time in (1e-3, 1.0))
    plain = drawn(client)
    distance = [float(np.abs(one - START).mean()) for one in (near, far)]
    assert distance[0] < distance[1] / 2
    assert np.abs(far - plain).mean() < distance[1]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m"])
def test_images_from_the_third_on_are_those_of_a_larger_batch(client: Client, sampler: str) -> None:
    whole = drawn(client, sampler=sampler, count=4)
    rest = drawn(client, sampler=sampler, count=2, first_image=2)
    assert rest.tobytes() == whole[2:].tobytes()


def test_one_start_serves_all_images_each_with_its_own_noise(client: Client) -> None:
    one = drawn(client, start=START[:1], start_time=0.7)
    each = drawn(client, start=START[[0, 0]], start_time=0.7)
    assert one.tobytes() == each.tobytes()
    assert not np.array_equal(one[0], one[1])


def test_the_folder_s_scheduler_is_described(client: Client) -> None:
    model = client.model("classes")
    assert model.scheduler is not None
    assert model.scheduler.name == "DDIMScheduler"
    assert (model.scheduler.timestep_spacing, model.scheduler.steps_offset) == ("leading", 1)
    assert model.scheduler.clip_sample_range == 1.0
    assert model.scheduler.samplers == ("ddim", "ddpm", "euler", "dpmpp_2m")
    assert model.label_guidance
    other = client.model("zeros")
    assert (other.scheduler, other.label_guidance) == (None, False)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "dpmpp_2m"])
def test_the_folder_s_timesteps_draw_the_images_of_the_library(
    client: Client, library: dict[str, Denoiser], sampler: str
) -> None:
    denoiser = library["classes"]
    want = of_the_library(denoiser, sampler, scheduler=denoiser.info.scheduler)
    options: dict[str, Any] = {"model": "classes", "sampler": sampler}
    got = drawn(client, **options, timesteps="folder")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    aligned = drawn(client, **options, timesteps="aligned")
    # Not the same bits: how a network of diffusers is batched may change the last ones.
    np.testing.assert_allclose(drawn(client, **options), aligned, rtol=1e-4, atol=1e-4)
    assert np.abs(aligned - got).max() > 1e-3


def test_labels_are_guided_by_denoise_and_score_and_sample(
    client: Client, library: dict[str, Denoiser]
) -> None:
    x = np.random.default_rng(2).normal(size=(2, *CLASSES)).astype(np.float32)
    query = make_query(torch.from_numpy(x), from_sigma([1.5]), [0, 2])
    query.guidance = np.full(2, 4.0)
    want = library["classes"].denoise(query).pixels
    asked: dict[str, Any] = {"model": "classes", "sigma": 1.5, "label": [0, 2]}
    got = client.denoise(x, **asked, guidance=4.0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        client.score(x, **asked, guidance=4.0), (want - x) / 1.5**2, rtol=1e-3, atol=1e-4
    )
    plainly = client.denoise(x, **asked)
    np.testing.assert_allclose(
        client.denoise(x, **asked, guidance=1.0), plainly, rtol=1e-4, atol=1e-5
    )
    plain, guided = (drawn(client, model="classes", label=[0, 2], guidance=g) for g in (None, 4.0))
    assert np.abs(plain - guided).max() > 1e-3


@pytest.mark.parametrize(
    ("model", "label"), [("classes", None), ("classes", [0, -1]), ("zeros", [0, 1])]
)
def test_guidance_without_a_label_or_a_class_for_none_is_refused(
    client: Client, model: str, label: list[int] | None
) -> None:
    shape = CLASSES if model == "classes" else SHAPE
    x = np.zeros((2, *shape), np.float32)
    calls = (
        lambda: client.denoise(x, model=model, sigma=1.0, label=label, guidance=2.0),
        lambda: drawn(client, model=model, label=label, guidance=2.0),
    )
    for call in calls:
        with pytest.raises(InvalidArgumentError, match="guidance: expected 0 or 1"):
            call()


def test_the_command_line_draws_from_a_picture(
    process: ServerProcess, client: Client, tmp_path: Path
) -> None:
    picture, out, want = (tmp_path / name for name in ("in.png", "out.png", "want.png"))
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE[1:]).astype(np.uint8)
    Image.fromarray(pixels).save(picture)
    done = run(
        *("els", "--target", process.target, "--model", "zeros", "--json", "sample"),
        *("--start", picture, "--times", "0.6,0.4,0.2", "--sampler", "euler", "--seed", 6),
        *("--first-image", 3, "--churn", 2, "--churn-noise", 1.01, "--out", out),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(out)
    options: dict[str, Any] = {"sampler": "euler", "churn": 2.0, "churn_noise": 1.01}
    images = drawn(
        client,
        **options,
        count=1,
        steps=None,
        start=pixels[None, None],
        first_image=3,
        times=[0.6, 0.4, 0.2],
    )
    write_grid(want, images)
    assert out.read_bytes() == want.read_bytes()
