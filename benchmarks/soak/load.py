"""Callers of a soak: each repeats one kind of valid or invalid call."""

from __future__ import annotations

import asyncio
import contextlib
import random
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_proto.inference import grpc_service_pb2 as oip
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from els_service.denoisers.banks import make_bank, save_bank

SHAPE = (1, 12, 12)
_BANK = "bank: ../_banks/random.safetensors\n"
DOCUMENTS = {
    "els": f"kind: analytic\nmachine: els\nwindow: 3\n{_BANK}",
    "gaussian": "kind: gaussian\nshape: [1, 12, 12]\nmean: 0.0\nvariance: 0.25\n",
    "ideal": f"kind: analytic\nmachine: ideal\n{_BANK}",
    "spare": f"kind: wiener\n{_BANK}",
}
TIMEOUT_S = 60.0


def write_models(root: Path) -> Path:
    """Write a small models root and return it."""
    (root / "_banks").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, *SHAPE)).astype(np.uint8)
    save_bank(make_bank(pixels), root / "_banks" / "random.safetensors")
    for name, document in DOCUMENTS.items():
        (root / name).mkdir()
        (root / name / "model.yaml").write_text(document)
    return root


@dataclass
class World:
    """State shared by the callers."""

    target: str
    metrics_url: str
    channel: grpc.aio.Channel
    answers: Counter[str] = field(default_factory=Counter)
    """Rounds by caller and outcome."""
    faults: list[str] = field(default_factory=list)
    """Unexpected outcomes."""
    seen: dict[int, bytes] = field(default_factory=dict)
    """Results by the seed of the request, which must never change."""

    @property
    def ours(self) -> Any:
        """Stub of denoise.v1."""
        return DenoiserServiceStub(self.channel)

    @property
    def protocol(self) -> Any:
        """Stub of the Open Inference Protocol."""
        return GRPCInferenceServiceStub(self.channel)


def request(kind: Any = pb.DenoiseRequest, seed: int = 0, **changes: Any) -> Any:
    """Return a request for one to eight images."""
    batch = 1 + seed % 8
    x = np.random.default_rng(seed).normal(size=(batch, *SHAPE)).astype("<f4")
    fields = {
        "model": ("els", "gaussian", "ideal")[seed % 3],
        "x": pb.Tensor(dtype=pb.DTYPE_F32, shape=x.shape, data=x.tobytes()),
        "level": pb.NoiseLevel(sigma=[0.1 + seed % 5]),
    }
    return kind(**{**fields, **changes})


async def denoise(world: World) -> None:
    """Denoise, and compare with the earlier result."""
    seed = random.randrange(24)
    answer = await world.ours.Denoise(request(seed=seed), timeout=TIMEOUT_S)
    if world.seen.setdefault(seed, answer.denoised.data) != answer.denoised.data:
        world.faults.append(f"request {seed}: expected the bits of its first response, got others")


async def score(world: World) -> None:
    """Request scores with a unique request id."""
    metadata = (("x-request-id", f"soak-{random.random()}"),)
    asked = request(pb.ScoreRequest, random.randrange(24))
    await world.ours.Score(asked, timeout=TIMEOUT_S, metadata=metadata)


async def infer(world: World) -> None:
    """Call the Open Inference Protocol."""
    x = np.zeros((2, *SHAPE), "<f4")
    asked = oip.ModelInferRequest(model_name="els", id=str(random.random()))
    asked.inputs.add(name="x", datatype="FP32", shape=x.shape)
    asked.inputs.add(name="sigma", datatype="FP32", shape=[1])
    asked.raw_input_contents.extend([x.tobytes(), np.array([1], "<f4").tobytes()])
    await world.protocol.ModelInfer(asked, timeout=TIMEOUT_S)


async def sample(world: World) -> None:
    """Sample images to the end, with resume tokens."""
    asked = pb.SampleRequest(
        model="els", count=2, steps=6, seed=random.randrange(9), return_resume_token=True
    )
    steps = [step async for step in world.ours.Sample(asked, timeout=TIMEOUT_S)]
    if [step.index for step in steps] != list(range(1, 7)):
        world.faults.append("a trajectory lacks steps")


async def leave(world: World) -> None:
    """Start a long trajectory and cancel it."""
    asked = pb.SampleRequest(model="gaussian", count=32, steps=1000, return_x=True)
    call = world.ours.Sample(asked, timeout=TIMEOUT_S)
    await call.read()
    call.cancel()


async def hurry(world: World) -> None:
    """Send a request with a deadline too short to be met."""
    with _expecting(world, grpc.StatusCode.DEADLINE_EXCEEDED):
        await world.ours.Denoise(request(seed=7, timeout_s=1e-6), timeout=TIMEOUT_S)


async def cancel(world: World) -> None:
    """Send a request and cancel it."""
    call = world.ours.Denoise(request(seed=2), timeout=TIMEOUT_S)
    await asyncio.sleep(random.random() / 500)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call


async def _mixed() -> AsyncIterator[pb.DenoiseRequest]:
    for seed in range(20):
        yield request(seed=seed, **({"labels": [99]} if seed % 5 == 4 else {}))


async def stream(world: World) -> None:
    """Send valid and invalid requests in one stream."""
    call = world.ours.DenoiseStream(_mixed(), timeout=TIMEOUT_S)
    answers = [answer.WhichOneof("result") async for answer in call]
    if answers != (["response"] * 4 + ["error"]) * 4:
        world.faults.append(f"a stream was answered {answers}")


async def leave_stream(world: World) -> None:
    """Read two responses of a stream and cancel it."""
    call = world.ours.DenoiseStream(_mixed(), timeout=TIMEOUT_S)
    await call.read()
    await call.read()
    call.cancel()


async def bad(world: World) -> None:
    """Send an invalid request."""
    with _expecting(world, grpc.StatusCode.INVALID_ARGUMENT):
        await world.ours.Denoise(request(windows=[random.randrange(100, 10_000)]))
    with _expecting(world, grpc.StatusCode.NOT_FOUND):
        await world.ours.Denoise(request(model=f"model-{random.random()}"))


async def reconnect(world: World) -> None:
    """Connect, send one request, disconnect."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(world.target, options) as channel:
        await DenoiserServiceStub(channel).Denoise(request(seed=1), timeout=TIMEOUT_S)


async def garbage(world: World) -> None:
    """Send bytes that are not gRPC."""
    host, _, port = world.target.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(random.randbytes(200))
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def reload(world: World) -> None:
    """Reload a model in use."""
    model = random.choice(["els", "gaussian", "ideal"])
    await world.protocol.RepositoryModelLoad(
        oip.RepositoryModelLoadRequest(model_name=model), timeout=TIMEOUT_S
    )


async def unload(world: World) -> None:
    """Unload an unused model, and load it again."""
    await world.protocol.RepositoryModelUnload(oip.RepositoryModelUnloadRequest(model_name="spare"))
    await world.protocol.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="spare"))


async def look(world: World) -> None:
    """Call every read-only method."""
    await world.ours.ListModels(pb.ListModelsRequest())
    await world.protocol.ModelStatistics(oip.ModelStatisticsRequest())
    await world.protocol.RepositoryIndex(oip.RepositoryIndexRequest())
    await asyncio.to_thread(scrape, world.metrics_url)


def scrape(url: str) -> str:
    """Return the page of metrics."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as page:
        text: str = page.read().decode()
        return text


CALLERS: tuple[Callable[[World], Awaitable[None]], ...] = (
    *(denoise, denoise, score, infer, sample, leave, hurry, cancel, stream, leave_stream),
    *(bad, reconnect, garbage, reload, unload, look),
)


async def run(world: World, stop: asyncio.Event, pause_s: float) -> None:
    """Run all callers, each in turn with its pauses, until ``stop``."""
    await asyncio.gather(*(_again(caller, world, stop, pause_s) for caller in CALLERS))


async def _again(
    caller: Callable[[World], Awaitable[None]], world: World, stop: asyncio.Event, pause_s: float
) -> None:
    while not stop.is_set():
        try:
            await caller(world)
            world.answers[caller.__name__] += 1
        except (grpc.RpcError, OSError) as error:
            world.faults.append(f"{caller.__name__}: {error}")
        await asyncio.sleep(pause_s * random.random())


@contextlib.contextmanager
def _expecting(world: World, code: grpc.StatusCode) -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is not code:
            raise
    else:
        world.faults.append(f"expected {code.name}, got a response")
