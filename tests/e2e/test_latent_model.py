"""Latent, diffusers and ONNX models on a real server: conditions, guidance, decoded samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.onnx_models import gaussian, write
from tests.support.pretrained import (
    LATENT,
    SHAPE,
    WIDTH,
    autoencoder,
    conditional_unet,
    scheduler,
    unet,
    write_folder,
)
from tests.support.processes import ServerProcess, serving
from typer.testing import CliRunner

from els_client import AsyncClient, Client, Conditioning, InvalidArgumentError, Query
from els_client.cli import app
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_service.denoisers.answers import score
from els_service.denoisers.base import Condition, make_query
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.pretrained.latent import LatentDenoiser
from els_service.denoisers.samplers import Options, sample
from els_service.repository import ModelRepository

Array = np.ndarray[Any, np.dtype[np.float32]]
STEPS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pretrained")
    parts = {"unet": conditional_unet(), "vae": autoencoder(), "scheduler": scheduler()}
    write_folder(root / "latent", "kind: latent\n", **parts)
    write_folder(root / "pixels", "kind: diffusers\n", unet=unet(), scheduler=scheduler())
    write(root, gaussian())
    return root


@pytest.fixture(scope="module")
def process(root: Path) -> Iterator[ServerProcess]:
    with serving("--models", root, "--threads", 1) as process:
        # Here and not where a refused model is missed: the log says why.
        assert [one for one in process.records() if one["level"] in ("warning", "error")] == []
        yield process


@pytest.fixture(scope="module")
def stub(process: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(process.target) as channel:
        yield DenoiserServiceStub(channel)


@pytest.fixture(scope="module")
def latent(root: Path) -> LatentDenoiser:
    denoiser = ModelRepository(root).load("latent")
    assert isinstance(denoiser, LatentDenoiser)
    return denoiser


def tensor(array: Array) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DTYPE_F32, shape=array.shape, data=array.astype("<f4").tobytes())


def array(message: pb.Tensor) -> Array:
    return np.frombuffer(message.data, "<f4").reshape(message.shape).astype(np.float32)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


GIVEN, WITHOUT = normal(0, 2, 5, WIDTH), normal(1, 1, 5, WIDTH)
GUIDED: dict[str, Any] = {
    "conditioning": tensor(GIVEN),
    "unconditional": tensor(WITHOUT),
    "guidance": 4.0,
}
CONDITIONS = [Condition(given, WITHOUT[0], 4.0) for given in GIVEN]


def request(**fields: Any) -> pb.DenoiseRequest:
    x, level = tensor(normal(2, 2, *LATENT)), pb.NoiseLevel(sigma=[0.5, 5.0])
    return pb.DenoiseRequest(model="latent", x=x, level=level, **fields)


def draw(stub: Any, **fields: Any) -> list[pb.SampleResponse]:
    default = {"model": "latent", "count": 2, "steps": STEPS, "seed": 7, "return_decoded": True}
    chosen: dict[str, Any] = default | GUIDED | fields
    return list(stub.Sample(pb.SampleRequest(**chosen), timeout=60))


def close(got: Array, want: Array) -> bool:
    return bool(np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want))


def test_a_latent_model_is_described(stub: Any) -> None:
    models = {model.name: model for model in stub.ListModels(pb.ListModelsRequest()).models}
    model = models["latent"]
    assert (model.kind, model.schedule) == ("latent", "timesteps")
    assert (model.channels, model.height, model.width) == LATENT
    assert model.conditioning == pb.Conditioning(max_rows=77, width=WIDTH)
    assert list(model.decoded_shape) == [3, 16, 16]
    for name in ("pixels", "model"):
        assert not models[name].HasField("conditioning")
        assert not models[name].decoded_shape


def test_each_image_is_answered_as_it_was_conditioned(stub: Any, latent: LatentDenoiser) -> None:
    query = make_query(normal(2, 2, *LATENT), from_sigma([0.5, 5.0]), (), (), CONDITIONS)
    got = array(stub.Denoise(request(**GUIDED), timeout=60).denoised)
    assert close(got, latent.denoise(query).pixels)
    one = array(stub.Denoise(request(conditioning=tensor(WITHOUT)), timeout=60).denoised)
    assert not close(one, got)


def test_time_is_of_the_timesteps_that_the_network_was_trained_at(stub: Any) -> None:
    schedule = scheduler()
    alpha_bar = schedule.alphas_cumprod[[9, 99]].double().tolist()
    x = tensor(normal(3, 2, *SHAPE))
    got, want = (
        array(stub.Denoise(pb.DenoiseRequest(model="pixels", x=x, level=level)).denoised)
        for level in (pb.NoiseLevel(time=[0.1, 1.0]), pb.NoiseLevel(alpha_bar=alpha_bar))
    )
    assert close(got, want)


def test_a_sample_ends_with_the_images_of_its_latents(stub: Any, latent: LatentDenoiser) -> None:
    *earlier, last = draw(stub)
    options = Options(steps=STEPS, schedule=latent.info.levels)
    *_, want = sample(latent, count=2, seed=7, options=options, conditions=CONDITIONS)
    assert close(array(last.x), want.x.float().numpy())
    assert close(array(last.decoded), latent.decode(want.x.float().numpy()))
    assert array(last.decoded).shape == (2, 3, 16, 16)
    assert not any(message.HasField("decoded") for message in earlier)
    assert not draw(stub, return_decoded=False)[-1].HasField("decoded")


def test_a_token_resumes_what_was_conditioned_so_and_nothing_else(stub: Any) -> None:
    first, *_, last = draw(stub, return_resume_token=True)
    token = first.resume_token
    resumed = draw(stub, resume_token=token)
    assert len(resumed) == STEPS - 1
    # Not to the bit: two images are decoded together or apart, as their predicted cost is.
    again, before = (np.frombuffer(step.decoded.data, "<f4") for step in (resumed[-1], last))
    np.testing.assert_allclose(again, before, rtol=0, atol=1e-5)
    for other in ({"guidance": 4.5}, {"conditioning": tensor(GIVEN + 1)}):
        with pytest.raises(grpc.RpcError, match="resume_token: expected a token of this very"):
            draw(stub, resume_token=token, **other)


def test_an_onnx_model_answers(stub: Any) -> None:
    x, level = normal(4, 1, 2, 4, 5), pb.NoiseLevel(sigma=[2.0])
    got = stub.Denoise(pb.DenoiseRequest(model="model", x=tensor(x), level=level)).denoised
    assert close(array(got), x * np.float32(0.2))


OTHER = tensor(np.full((2, 5, WIDTH), np.nan, np.float32))
BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "conditioning: expected [1 to 77, 6] for each image, got none"),
    ({"conditioning": tensor(GIVEN[0])}, "conditioning.shape: expected [1 or 2, 1 to 77, 6]"),
    ({"conditioning": tensor(normal(0, 3, 5, WIDTH))}, "conditioning.shape: expected"),
    ({"conditioning": tensor(normal(0, 2, 5, 7))}, "conditioning.shape: expected"),
    ({"conditioning": tensor(normal(0, 2, 78, WIDTH))}, "conditioning.shape: expected"),
    ({"conditioning": OTHER}, "conditioning: expected finite"),
    (
        {"conditioning": pb.Tensor(dtype=pb.DTYPE_U8, shape=[1, 1, WIDTH], data=bytes(WIDTH))},
        "conditioning.dtype: expected one of DTYPE_F32",
    ),
    (
        {"conditioning": pb.Tensor(dtype=pb.DTYPE_F32, shape=[1, 1, WIDTH])},
        "conditioning.data: expected 24 bytes",
    ),
    ({"unconditional": tensor(WITHOUT)}, "unconditional: expected none without conditioning"),
    ({"guidance": 2.0}, "guidance: expected 0 without conditioning"),
    ({"conditioning": tensor(GIVEN), "guidance": 2.0}, "unconditional: expected one if"),
    (
        {"conditioning": tensor(GIVEN), "unconditional": tensor(WITHOUT)},
        "unconditional: expected one if guidance is neither 0 nor 1, else none, got one",
    ),
    (GUIDED | {"guidance": 1e3}, "guidance: expected -100 to 100"),
    (GUIDED | {"guidance": float("nan")}, "guidance: expected -100 to 100"),
    (GUIDED | {"unconditional": tensor(normal(0, 1, 4, WIDTH))}, "unconditional: expected shape"),
]


@pytest.mark.parametrize(("fields", "reason"), BAD)
def test_a_bad_condition_is_refused_by_field(
    stub: Any, fields: dict[str, Any], reason: str
) -> None:
    calls = (
        lambda: stub.Denoise(request(**fields), timeout=60),
        lambda: list(stub.Sample(pb.SampleRequest(model="latent", count=2, steps=2, **fields))),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as error:
            call()
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert reason in str(error.value.details())


ASKED: dict[str, Any] = {
    "model": "latent",
    "conditioning": GIVEN,
    "unconditional": WITHOUT.astype(np.float64),
    "guidance": 4.0,
}


def test_the_client_conditions_and_guides_every_call(
    process: ServerProcess, latent: LatentDenoiser
) -> None:
    x = normal(2, 2, *LATENT)
    query = make_query(x, from_sigma([0.5, 5.0]), (), (), CONDITIONS)
    mean = latent.denoise(query)
    with Client(process.target) as client:
        model = client.model("latent")
        assert model.conditioning == Conditioning(max_rows=77, width=WIDTH)
        assert model.decoded_shape == (3, 16, 16)
        plain = client.model("pixels")
        assert (plain.conditioning, plain.decoded_shape) == (None, None)
        assert close(client.denoise(x, sigma=[0.5, 5.0], **ASKED), mean.pixels)
        assert close(client.score(x, sigma=[0.5, 5.0], **ASKED), score(query, mean.mean).numpy())
        (streamed,) = client.denoise_many([Query(x, sigma=[0.5, 5.0], **ASKED)])
        assert close(streamed, mean.pixels)
        with pytest.raises(InvalidArgumentError, match="conditioning: expected none for this"):
            client.denoise(normal(3, 1, *SHAPE), sigma=1.0, **ASKED | {"model": "pixels"})


async def test_both_clients_draw_images_of_guided_latents(process: ServerProcess) -> None:
    drawing: dict[str, Any] = {"count": 2, "steps": STEPS, "seed": 7, "want": ("decoded",)}
    with Client(process.target) as client:
        first, *_, last = client.sample(**drawing, **ASKED)
    async with AsyncClient(process.target) as other:
        *_, same = [step async for step in other.sample(**drawing, **ASKED)]
    assert last.decoded.shape == (2, 3, 16, 16)
    assert np.abs(last.decoded).max() <= 1
    # Not to the bit, as above: the model is not batch-invariant.
    np.testing.assert_allclose(same.decoded, last.decoded, rtol=0, atol=1e-5)
    with pytest.raises(AttributeError, match="no decoded"):
        _ = first.decoded


def test_the_command_line_writes_the_decoded_images(process: ServerProcess, tmp_path: Path) -> None:
    np.save(tmp_path / "given.npy", GIVEN)
    np.save(tmp_path / "without.npy", WITHOUT)
    arguments = ["sample", "--target", process.target, "--model", "latent", "--count", "2"]
    arguments += ["--steps", "2", "--out", str(tmp_path / "grid.png")]
    refused = CliRunner().invoke(app, arguments)
    assert (refused.exit_code, "els: conditioning: expected" in refused.stderr) == (2, True)
    arguments += ["--conditioning", str(tmp_path / "given.npy"), "--guidance", "4"]
    arguments += ["--unconditional", str(tmp_path / "without.npy")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert (grid.mode, grid.size) == ("RGB", (2 * 16 * 7, 16 * 7))
    refused = CliRunner().invoke(app, [*arguments, "--gif", str(tmp_path / "steps.gif")])
    assert "gif: expected none, as steps of a latent model are latents" in refused.stderr
    (tmp_path / "given.npy").write_bytes(b"no array")
    refused = CliRunner().invoke(app, arguments)
    assert (refused.exit_code, "expected an array in .npy" in refused.stderr) == (2, True)


def test_models_without_conditions_or_decoder_refuse_both(stub: Any) -> None:
    x, level = tensor(normal(0, 1, *SHAPE)), pb.NoiseLevel(sigma=[1.0])
    asked = pb.DenoiseRequest(model="pixels", x=x, level=level, conditioning=tensor(WITHOUT))
    with pytest.raises(grpc.RpcError, match="conditioning: expected none for this model"):
        stub.Denoise(asked)
    with pytest.raises(grpc.RpcError, match="return_decoded: expected false for this model"):
        list(stub.Sample(pb.SampleRequest(model="pixels", steps=1, return_decoded=True)))


def test_the_library_is_the_same_whatever_torch_seed(latent: LatentDenoiser) -> None:
    torch.manual_seed(9)
    query = make_query(normal(2, 2, *LATENT), from_sigma([1.0]), (), (), CONDITIONS)
    first = latent.denoise(query).pixels
    torch.manual_seed(10)
    np.testing.assert_array_equal(latent.denoise(query).pixels, first)
