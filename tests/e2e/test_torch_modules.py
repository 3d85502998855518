"""Modules of torch over a server: the bits of the twin in this process, and a server that ends."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import torch_client
from diffusers import DDIMPipeline, DDIMScheduler
from tests.support.models_folder import SHAPE
from tests.support.processes import ServerProcess

from els_client import Client, UnavailableError
from els_client.torch import DiffusersUNet, LocalDenoiser, RemoteDenoiser

# torch compiles decompositions by it when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
STEPS = 10
X = torch.linspace(-1, 1, 60).reshape(2, *SHAPE)


@pytest.mark.parametrize("name", ["zeros", "wiener"])
def test_server_and_process_give_the_same_bits(client: Client, models: Path, name: str) -> None:
    remote, local = RemoteDenoiser(client, name), LocalDenoiser(models / name)
    found = []
    for denoiser in (remote, local):
        f = torch.func.vjp(lambda x, d=denoiser: d(x, [0.5, 2.0], label=[0, 2]), X)
        along = torch.func.jvp(lambda x, d=denoiser: d(x, alpha_bar=0.3), (X,), (X.flip(0),))
        found.append([f[0], *f[1](X.flip(0)), *along])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    same = ("kind", "machine", "shape", "schedule", "label_names", "limits", "has_gradients")
    for field in same:
        assert getattr(remote.info, field) == getattr(local.info, field)


def test_variances_and_their_absence_are_the_same(client: Client, models: Path) -> None:
    one = RemoteDenoiser(client, "zeros").variance(X, 0.5)
    assert torch.equal(one, LocalDenoiser(models / "zeros").variance(X, 0.5))
    texts = []
    for denoiser in (RemoteDenoiser(client, "wiener"), LocalDenoiser(models / "wiener")):
        with pytest.raises(ValueError, match="return_variance") as raised:
            denoiser.variance(X, 0.5)
        texts.append(str(raised.value).partition(" (")[0])
    assert texts[0].startswith(texts[1].partition(",")[0])


def test_a_pipeline_of_diffusers_draws_the_image_of_ddim(client: Client) -> None:
    steps = client.sample(model="zeros", sampler="ddim", steps=STEPS, count=2, want=["noise"])
    first, *_, last = steps
    angles = np.pi / (2 * 1.008) * np.arange(STEPS + 1) / STEPS
    betas = 1 - (np.cos(angles[1:]) / np.cos(angles[:-1])) ** 2
    scheduler = DDIMScheduler(
        num_train_timesteps=STEPS, trained_betas=betas.tolist(), clip_sample=False
    )
    unet = DiffusersUNet(client, "zeros", scheduler=scheduler)
    scheduler.set_timesteps(STEPS)
    x = torch.from_numpy(first.noise)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    np.testing.assert_allclose(x.numpy(), last.x, rtol=0, atol=1e-4)

    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    (drawn,) = pipeline(
        2, generator, num_inference_steps=STEPS, output_type="pt", return_dict=False
    )
    assert drawn.shape == (2, *SHAPE)
    assert 0 <= float(drawn.min()) < float(drawn.max()) <= 1


def solved(denoiser: RemoteDenoiser, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return x after some steps of a solver that moves along a gradient."""
    for step in range(first, last):
        point = x.clone().requires_grad_()
        loss = (denoiser(point, 1.0 / (1 + step)) - 0.5).square().sum()
        x = x - 0.1 * torch.autograd.grad(loss, point)[0]
    return x


def test_a_solver_goes_on_where_it_was_after_its_server_went_away(
    models: Path, server: ServerProcess, tmp_path: Path
) -> None:
    options = ("--models", models, "--threads", 1)
    first = ServerProcess(tmp_path / "first", *options)
    port = first.ready["grpc_port"]
    again = None
    try:
        with Client(first.target) as client:
            denoiser = RemoteDenoiser(client, "zeros")
            x = solved(denoiser, X, 0, 2)
            first.kill()
            with pytest.raises(UnavailableError):
                solved(denoiser, x, 2, 4)
            again = ServerProcess(tmp_path / "again", *options, f"--port={port}")
            x = solved(denoiser, x, 2, 4)
    finally:
        first.kill()
        if again is not None:
            again.kill()
    with Client(server.target) as client:
        assert torch.equal(x, solved(RemoteDenoiser(client, "zeros"), X, 0, 4))


def test_the_example_of_the_page_runs(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(EXAMPLE.replace("127.0.0.1:50051", server.target).replace("fashion-els", "zeros"), {})
    assert capsys.readouterr().out == "torch.Size([4, 1, 6, 5]) torch.float32 cpu\n"


def test_what_a_module_adds_to_a_call_is_measured(client: Client) -> None:
    rows = torch_client.measured(client, rounds=1, calls=2)
    assert [row["bytes"] for row in rows] == [12288] * 4
    assert rows[0]["ratio"] == 1
    assert all(row["ratio"] > 0 for row in rows)
