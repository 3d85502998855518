"""Every interface draws the same images when it is given nothing but the name of a sampler."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import grpc
import numpy as np
import pytest
from tests.support.environments import SOURCES, python_with
from tests.support.models_folder import SHAPE
from tests.support.processes import ServerProcess, environment, run

from els_client import AsyncClient, Client
from els_client._pictures import write_grid
from els_client._types import Sampler
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_service.denoisers.samplers import ALL_SAMPLERS, SAMPLERS, Options, sample
from els_service.repository import ModelRepository

MODEL, STEPS = "zeros", Options().steps
LOCUST = """
import sys

import numpy as np
from locust.env import Environment

from els_client.locust_user import DenoiserUser

target, sampler, out = sys.argv[1:]
user = type("Caller", (DenoiserUser,), {"host": target})(Environment())
*_, last = user.client.sample(model="zeros", sampler=sampler)
np.save(out, last.x)
user.on_stop()
"""


@pytest.fixture(scope="module")
def of_the_library(models: Path) -> Callable[[str], np.ndarray]:
    denoiser = ModelRepository(models).load(MODEL)

    def drawn(sampler: str) -> np.ndarray:
        *_, last = sample(denoiser, sampler=sampler)
        return last.x.float().numpy()

    return drawn


def test_every_sampler_of_the_library_has_a_name_in_the_contract_and_the_client() -> None:
    contract = {name.removeprefix("SAMPLER_").lower() for name, _ in pb.Sampler.items()}
    assert contract - {"unspecified"} == set(get_args(Sampler)) == set(ALL_SAMPLERS)


@pytest.mark.parametrize("sampler", SAMPLERS)
async def test_a_sampler_s_name_alone_draws_the_same_bits_by_library_wire_and_clients(
    server: ServerProcess,
    client: Client,
    of_the_library: Callable[[str], np.ndarray],
    channel: grpc.Channel,
    sampler: Sampler,
) -> None:
    want = of_the_library(sampler).tobytes()
    request = pb.SampleRequest(
        model=MODEL, sampler=pb.Sampler.Value(f"SAMPLER_{sampler.upper()}"), steps=STEPS
    )
    *_, last = DenoiserServiceStub(channel).Sample(request, timeout=60)
    assert last.x.data == want
    *_, step = client.sample(model=MODEL, sampler=sampler)
    assert step.x.tobytes() == want
    async with AsyncClient(server.target) as other:
        steps = [step async for step in other.sample(model=MODEL, sampler=sampler)]
    assert steps[-1].x.tobytes() == want


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_a_sampler_s_name_alone_draws_the_same_picture_by_the_command_line(
    server: ServerProcess,
    of_the_library: Callable[[str], np.ndarray],
    tmp_path: Path,
    sampler: str,
) -> None:
    out, want = tmp_path / "out.png", tmp_path / "want.png"
    shared = ("--target", server.target, "--model", MODEL)
    done = run("els", *shared, "sample", "--sampler", sampler, "--out", out)
    assert done.returncode == 0, done.stderr
    write_grid(want, of_the_library(sampler))
    assert out.read_bytes() == want.read_bytes()


def test_a_sampler_s_name_alone_draws_the_same_bits_by_locust(
    server: ServerProcess, of_the_library: Callable[[str], np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "drawn.npy"
    # In a process of its own: locust patches the one that imports it.
    done = subprocess.run(
        [python_with("locust", "locust"), "-c", LOCUST, server.target, "ddpm", out],
        env=environment(PYTHONPATH=SOURCES),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    drawn = np.load(out)
    assert drawn.shape == (1, *SHAPE)
    assert drawn.tobytes() == of_the_library("ddpm").tobytes()
