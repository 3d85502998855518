"""New pictures from one picture through a running server: sizes, modes, bits, errors, resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.hills import write_hills
from tests.support.processes import ServerProcess, serving
from typer.testing import CliRunner

from els_client import AsyncClient, Client, InvalidArgumentError, Step
from els_client import _remix_pictures as drawing
from els_client._remix import RemixOptions
from els_client.cli import app
from els_kernels import FOLD_GEOMETRIES
from els_kernels.reference_fold_statistics import ReferenceFoldPosterior
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_proto.inference import grpc_service_pb2 as oip
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from els_service.denoisers.picture import PictureDenoiser
from els_service.denoisers.pyramids import PyramidPlan, asked_sizes
from els_service.denoisers.samplers import options_for, sample
from els_service.repository import ModelRepository

SIZE = (16, 22)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hills(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[ServerProcess]:
    with serving("--models", models, "--threads", 1) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.target, timeout_s=60) as connected:
        yield connected


def draw(client: Client, **options: Any) -> list[Step]:
    given = {"model": "hills", "sampler": "pyramid", "size": SIZE, **options}
    return list(client.sample(**given))


def test_a_model_describes_its_scales(client: Client) -> None:
    model = client.model("hills")
    assert model.kind == "picture"
    assert model.scales == ((8, 10), (20, 24))
    assert model.label_names == ("8x10", "20x24")
    assert model.scale_steps == 4
    assert model.fold == pytest.approx(0.2)


def test_the_server_draws_the_bits_of_the_library_and_streams_every_scale(
    client: Client, models: Path
) -> None:
    steps = draw(client, seed=3, count=2)
    assert [(step.scale, step.scales) for step in steps] == [(0, 2)] * 4 + [(1, 2)] * 4
    assert [step.index for step in steps] == list(range(1, 9))
    model = ModelRepository(models).load("hills")
    plan = PyramidPlan(asked_sizes(model.info.scales, SIZE, 5), 5)
    chosen = options_for(model.info, steps=4, pyramid=plan)
    expected = list(sample(model, sampler="pyramid", options=chosen, seed=3, count=2))
    for step, own in zip(steps, expected, strict=True):
        np.testing.assert_array_equal(step.x, own.x.float().numpy())
        np.testing.assert_array_equal(step.denoised, own.denoised.float().numpy())
    assert steps[-1].x.shape == (2, 3, *SIZE)


def test_callers_at_once_get_the_bits_that_each_gets_alone(client: Client) -> None:
    alone = [draw(client, seed=seed)[-1].x for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: draw(client, seed=seed)[-1].x, range(4)))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_wide_tileable_and_symmetric_pictures_are_what_they_are_named(client: Client) -> None:
    assert draw(client, size=(9, 50))[-1].x.shape == (1, 3, 9, 50)
    tile = draw(client, tileable=True)[-1].x[0]
    assert tile.shape == (3, *SIZE)
    assert not np.array_equal(tile, draw(client)[-1].x[0])
    mirrored = draw(client, symmetric=True)[-1].x
    np.testing.assert_array_equal(mirrored, mirrored[..., ::-1])


def test_a_mask_keeps_the_pixels_of_the_start(client: Client) -> None:
    start = np.linspace(-0.9, 0.9, 3 * 16 * 22, dtype=np.float32).reshape(1, 3, *SIZE)
    mask = np.zeros((1, 1, *SIZE), np.float32)
    mask[..., 5:10, 6:15] = 1
    x = draw(client, start=start, mask=mask)[-1].x
    kept = np.broadcast_to(mask == 0, x.shape)
    np.testing.assert_array_equal(x[kept], start[kept])


@pytest.mark.parametrize(
    "options",
    [{}, {"tileable": True}, {"start_time": 0.6}],
    ids=["new", "tileable", "from a start"],
)
def test_a_token_of_any_step_goes_on_with_the_same_bits(
    server: ServerProcess, options: dict[str, Any]
) -> None:
    if "start_time" in options:
        pixels = np.zeros((1, 3, *SIZE), np.float32)
        start = pb.Tensor(dtype=pb.DTYPE_F32, shape=pixels.shape, data=pixels.tobytes())
        options = {**options, "start": start}
    request = pb.SampleRequest(
        model="hills", sampler=pb.SAMPLER_PYRAMID, height=SIZE[0], width=SIZE[1], seed=9,
        return_x=True, return_denoised=True, return_resume_token=True, **options,
    )  # fmt: skip
    with grpc.insecure_channel(server.target) as channel:
        stub = DenoiserServiceStub(channel)
        whole = list(stub.Sample(request, timeout=60))
        assert len(whole) == 7 if "start" in options else 8
        for step in whole[:-1]:
            request.resume_token = step.resume_token
            rest = list(stub.Sample(request, timeout=60))
            assert rest == whole[step.index :]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model": "flat", "size": None}, "sampler: expected another for a model without scales"),
        ({"size": (4, 30)}, "height: expected 0, or 5 to"),
        ({"size": (30, 5000)}, "width: expected 0, or 5 to"),
        ({"size": (1030, 30), "tileable": True}, "height: expected at most 1024 with tileable"),
        ({"label": 0}, "labels: expected none for SAMPLER_PYRAMID"),
        ({"window": 3}, "windows: expected none for SAMPLER_PYRAMID"),
        ({"want": ["noise"]}, "return_noise: expected false for SAMPLER_PYRAMID"),
        ({"tileable": True, "symmetric": True}, "symmetric: expected false with tileable"),
        ({"sampler": "ddim", "tileable": True}, "tileable: expected unset but for"),
        ({"sampler": "ddim", "window_scale": 2.0}, "window_scale: expected 0 for a model without"),
        ({"steps": 1}, "steps: expected at least 2 for pyramid"),
        ({"mask": np.zeros((1, 1, *SIZE), np.float32)}, "mask: expected unset without start"),
    ],
)
def test_a_wrong_field_is_rejected_by_name(
    client: Client, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        draw(client, **options)
    assert reason in str(caught.value)


def test_a_mask_of_another_size_is_rejected_with_both_sizes(client: Client) -> None:
    start = np.zeros((1, 3, *SIZE), np.float32)
    with pytest.raises(InvalidArgumentError, match=r"mask.shape: expected \[1 or 1, 1, 16, 22\]"):
        draw(client, start=start, mask=np.zeros((1, 1, 16, 21), np.float32))
    with pytest.raises(InvalidArgumentError, match="mask: expected values 0"):
        draw(client, start=start, mask=np.full((1, 1, *SIZE), 0.5, np.float32))


def reference(
    models: Path, x: np.ndarray[Any, Any], sigma: float, scale: int
) -> ReferenceFoldPosterior:
    """Return the specification of the answer for an image, from the picture at a scale."""
    model = ModelRepository(models).load("hills")
    assert isinstance(model, PictureDenoiser)
    image, rho = model.bank.images[scale], model.info.fold
    geometry = FOLD_GEOMETRIES["els", "inside"]
    return ReferenceFoldPosterior(torch.from_numpy(x), [image], 1.0, sigma, 5, rho, geometry)


@pytest.mark.parametrize(("scale", "size"), [(0, (9, 7)), (1, (7, 11))])
def test_sources_are_pixels_of_the_picture_at_the_scale_of_the_label(
    client: Client, models: Path, scale: int, size: tuple[int, int]
) -> None:
    x = np.random.default_rng(0).normal(size=(1, 3, *size)).astype(np.float32)
    options: dict[str, Any] = {"model": "hills", "sigma": 0.5, "label": scale}
    found = client.explain(x, top=4, images=2, **options)
    want, model = reference(models, x[0], 0.5, scale), client.model("hills")
    (weights,) = want.weights()
    assert np.abs(found.denoised[0] - want.mean().numpy()).max() <= 1e-5
    assert np.abs(found.variance[0] - want.variance().numpy()).max() <= 1e-5
    assert np.abs(found.entropy[0] - want.entropy().numpy()).max() <= 1e-4
    largest = weights.sort(descending=True).values[:, :4].reshape(*size, 4).numpy()
    assert np.abs(found.weights[0] - largest).max() <= 1e-5
    assert set(found.sources[..., 0].ravel()) == {scale}
    assert np.eye(2)[scale].tolist() == found.shares[0].round(6).tolist()
    assert found.labels[scale] == scale
    assert found.label_names == model.label_names
    assert found.file_names == {scale: "photo.png"}
    ((image, pixels),) = found.images[0].items()
    assert (image, pixels.shape) == (scale, (3, *model.scales[scale]))
    row, col = found.sources[0, 3, 2, 0, 1:].tolist()
    assert float(weights[3 * size[1] + 2, row * pixels.shape[2] + col]) == pytest.approx(
        float(found.weights[0, 3, 2, 0]), abs=1e-5
    )


def test_products_and_variance_of_a_picture_are_those_of_brute_force(
    client: Client, models: Path
) -> None:
    x, g = np.random.default_rng(1).normal(size=(2, 1, 3, 8, 9)).astype(np.float32)
    options: dict[str, Any] = {"model": "hills", "sigma": 0.5, "label": 1}
    want, along = reference(models, x[0], 0.5, 1), torch.from_numpy(g[0])
    _, pulled = client.vjp(x, g, **options)
    _, pushed = client.jvp(x, g, **options)
    _, variance = client.denoise_with_variance(x, **options)
    for got, exact in (
        (pulled, want.vjp(along)),
        (pushed, want.jvp(along)),
        (variance, want.variance()),
    ):
        assert np.abs(got[0] - exact.numpy()).max() <= 1e-4 * float(exact.abs().max())


def test_the_model_says_that_it_has_sources_gradients_and_reports(client: Client) -> None:
    model = client.model("hills")
    assert (model.has_sources, model.has_gradients) == (True, True)


@pytest.mark.parametrize("tileable", [False, True], ids=["new", "tileable"])
def test_steps_of_every_scale_are_explained_and_change_no_image(
    client: Client, tileable: bool
) -> None:
    plain = draw(client, seed=3, tileable=tileable)
    steps = draw(client, seed=3, tileable=tileable, explain_steps=[4, 8])
    for step, same in zip(steps, plain, strict=True):
        np.testing.assert_array_equal(step.x, same.x)
    for index, scale in ((4, 0), (8, 1)):
        found = steps[index - 1].explanation
        assert found.sources.shape[1:3] == steps[index - 1].x.shape[2:]
        assert found.shares[0].tolist() == pytest.approx(np.eye(2)[scale].tolist())
    # The last step of a scale lands on D itself.
    assert np.abs(steps[7].explanation.denoised - steps[7].x).max() <= 1e-5


def test_the_picture_itself_is_one_region_in_place_and_a_part_of_it_is_one_that_moved(
    client: Client, models: Path
) -> None:
    model = ModelRepository(models).load("hills")
    assert isinstance(model, PictureDenoiser)
    picture = model.bank.images[1].numpy()
    (copied,) = client.originality(picture[None], model="hills")
    assert copied.nearest.tolist() == [1]
    assert copied.distances.tolist() == [0]
    assert copied.gap_ratio is None
    assert copied.absent["gap_ratio"] == "needs a bank of at least 2 images of its size, this has 1"
    assert (copied.largest_image, copied.in_place, copied.largest_region) == (1, 1, 1)
    (part,) = client.originality(picture[None, :, 2:14, 3:], model="hills")
    assert part.largest_region == pytest.approx(1)
    assert part.in_place == 0
    (drawn,) = draw(client, seed=3, originality=True)[-1].originality
    assert drawn.largest_region is not None
    assert drawn.largest_region < 1


def test_els_explain_draws_a_picture_and_its_sources(server: ServerProcess, tmp_path: Path) -> None:
    words = ["explain", "--seed", "0", "--model", "hills", "--out", str(tmp_path / "why")]
    result = CliRunner().invoke(app, [*words, "--target", server.target, "--json"])
    assert result.exit_code == 0, result.output
    (image,) = json.loads(result.output)["bank_images"]
    assert (image["label"], image["file"]) == ("20x24", "photo.png")
    with Image.open(tmp_path / "why" / "sheet.png") as sheet:
        assert min(sheet.size) > 100
    words = ["originality", "--seed", "0", "--model", "hills", "--target", server.target, "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert 0 < json.loads(result.output)["largest_region"] < 1


def test_els_sweep_draws_a_picture_by_every_sampler_but_with_its_own_patch(
    server: ServerProcess, tmp_path: Path
) -> None:
    words = ["sweep", str(tmp_path / "sheet.png"), "--steps", "2", "--model", "hills"]
    result = CliRunner().invoke(app, [*words, "--target", server.target])
    assert result.exit_code == 0, result.output
    *rows, _ = result.output.splitlines()
    assert [row.split()[0] for row in rows] == ["pyramid", "ddim", *["ddpm,"] * 2, *["heun,"] * 3]
    # Shares of one picture are 1 and say nothing.
    assert all("region" in row and "in place" in row for row in rows)


def test_a_damaged_picture_is_refused_by_name_and_other_models_serve_on(
    server: ServerProcess, client: Client, models: Path
) -> None:
    before = draw(client)[-1].x
    shutil.copytree(models / "hills", models / "cut")
    whole = (models / "hills" / "photo.png").read_bytes()
    (models / "cut" / "photo.png").write_bytes(whole[: len(whole) // 2])
    with grpc.insecure_channel(server.target) as channel:
        stub = GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match=r"photo\.png: cannot be read") as caught:
            stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="cut"), timeout=60)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    np.testing.assert_array_equal(draw(client)[-1].x, before)
    assert [model.name for model in client.models()] == ["flat", "hills"]


def remix(target: str, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["remix", *words, "--target", target])
    return result.exit_code, result.output


@pytest.mark.parametrize("mode", ["new", "tileable", "symmetric", "variation", "wider"])
def test_els_remix_writes_pictures_of_the_size_asked_for(
    server: ServerProcess, models: Path, tmp_path: Path, mode: str
) -> None:
    out = tmp_path / "out.png"
    words = ["--model", "hills", "--out", str(out), "--size", "120x10", "--mode", mode]
    code, output = remix(server.target, str(models / "hills" / "photo.png"), *words)
    assert code == 0, output
    with Image.open(out) as picture:
        assert picture.size == (120, 10)


def test_els_remix_rejects_other_models_and_finds_the_one_that_there_is(
    server: ServerProcess, models: Path, tmp_path: Path
) -> None:
    photo = str(models / "hills" / "photo.png")
    code, output = remix(server.target, photo, "--model", "flat")
    assert code == 2
    assert "expected one of kind picture" in output
    words = ("--size", "8x8", "--json", "--out", str(tmp_path / "out.png"))
    code, output = remix(server.target, photo, *words)
    assert code == 0
    assert json.loads(output)["model"] == "hills"


def test_a_remix_keeps_what_its_mode_promises(client: Client, models: Path) -> None:
    with Image.open(models / "hills" / "photo.png") as file:
        photo = np.asarray(file)
    mask = np.zeros(photo.shape[:2], bool)
    mask[6:12, 8:16] = True
    damaged = np.where(mask[..., None], 0, photo).astype(np.uint8)
    inpainted = client.remix(damaged, model="hills", mode="inpaint", mask=mask)[0]
    shown = np.rint((inpainted + 1) * 127.5).transpose(1, 2, 0)
    np.testing.assert_array_equal(shown[~mask], photo[~mask])
    # No pixel of the photograph is black: the damage is gone.
    assert photo.max(-1).min() > 30
    assert shown[mask].max(-1).min() > 30
    edited = client.remix(photo, model="hills", mode="edit", start=photo, strength=0.2)
    varied = client.remix(photo, model="hills", mode="variation", strength=0.9)
    own = photo.transpose(2, 0, 1) / 127.5 - 1
    assert abs(edited - own).mean() < abs(varied - own).mean()
    assert client.remix(photo, model="hills", mode="taller").shape == (1, 3, 30, 24)


async def test_both_clients_draw_the_same_pictures(server: ServerProcess, client: Client) -> None:
    options: RemixOptions = {"model": "hills", "size": SIZE, "seed": 5, "count": 2}
    async with AsyncClient(server.target) as other:
        images = await other.remix(**options)
    np.testing.assert_array_equal(images, client.remix(**options))


def test_els_remix_shows_from_where_in_the_photograph_each_pixel_came(
    server: ServerProcess, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    words = ("--model", "hills", "--size", "24x20", "--explain", "--out", str(out))
    code, output = remix(server.target, str(models / "hills" / "photo.png"), *words)
    assert code == 0, output
    with Image.open(tmp_path / "out-sources.png") as sheet:
        pixels = np.asarray(sheet)
    # The mosaic at the top right is of colours of places, none of which is black.
    zoom = 192 // 24
    left = drawing.MARGIN + 24 * zoom + drawing.GAP
    mosaic = pixels[drawing.MARGIN :, left:][: 20 * zoom : zoom, : 24 * zoom : zoom]
    rows, cols = np.indices((20, 24))
    colours = drawing.coordinate_colours(rows, cols, (20, 24)).reshape(-1, 3)
    assert {tuple(one) for one in mosaic.reshape(-1, 3)} <= {tuple(one) for one in colours}
    assert len(np.unique(mosaic.reshape(-1, 3), axis=0)) > 20
