"""Five hundred models: they start, are listed, measured and changed in a time that is linear."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from tests.support.messages import array, asked, denoiser, inference
from tests.support.models_folder import DOCUMENTS, SHAPE, write_models
from tests.support.processes import ServerProcess, serving
from tests.support.refusals import TIMEOUT_S

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as oip

MODELS = 500
GAUSSIAN = "kind: gaussian\nshape: [1, 6, 5]\nmean: {}\nvariance: 0.25\n"
NAMES = [f"model-{i:03}" for i in range(MODELS)]
MESSAGE = 4 << 20
"""What gRPC's clients take unless they are told otherwise."""
X = np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = (GAUSSIAN, DOCUMENTS["wiener"], DOCUMENTS["zeros"])
    documents = {name: kinds[i % 3].format(i / MODELS) for i, name in enumerate(NAMES)}
    return write_models(tmp_path_factory.mktemp("many") / "models", documents)


@pytest.fixture(scope="module")
def many(root: Path) -> Iterator[ServerProcess]:
    with serving("--models", root, "--threads", 1) as process:
        yield process


@pytest.fixture
async def aio(many: ServerProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(many.target) as channel:
        yield channel


async def scraped(server: ServerProcess) -> bytes:
    def get() -> bytes:
        with urlopen(server.metrics_url, timeout=TIMEOUT_S) as page:
            return bytes(page.read())

    return await asyncio.to_thread(get)


async def index(channel: grpc.aio.Channel) -> dict[str, str]:
    request = oip.RepositoryIndexRequest()
    answer = await inference(channel).RepositoryIndex(request, timeout=TIMEOUT_S)
    return {model.name: model.state for model in answer.models}


async def test_all_are_listed_healthy_and_answer_as_themselves(aio: grpc.aio.Channel) -> None:
    listed = await denoiser(aio).ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S)
    assert [model.name for model in listed.models] == NAMES
    assert listed.ByteSize() < MESSAGE / 4
    assert await index(aio) == dict.fromkeys(NAMES, "READY")
    health: Any = HealthStub(aio)
    answers = set()
    for name in NAMES:
        check = health_pb2.HealthCheckRequest(service=name)
        status = await health.Check(check, timeout=TIMEOUT_S)
        assert status.status == health_pb2.HealthCheckResponse.SERVING
        answer = await denoiser(aio).Denoise(asked(X, model=name), timeout=TIMEOUT_S)
        answers.add(array(answer.denoised).tobytes())
    # A Gaussian for each mean, and two machines over one bank.
    assert len(answers) == (MODELS + 2) // 3 + 2


async def test_a_metrics_page_of_all_models_is_bounded_and_does_not_delay_calls(
    many: ServerProcess, aio: grpc.aio.Channel
) -> None:
    page = await scraped(many)
    assert len(page) < 10_000 * MODELS
    assert all(f'els_model_memory_bytes{{model="{name}"}}'.encode() in page for name in NAMES[::3])
    scraping = asyncio.ensure_future(scraped(many))
    slowest = 0.0
    while not scraping.done():
        began = time.perf_counter()
        await denoiser(aio).Denoise(asked(X, model=NAMES[0]), timeout=TIMEOUT_S)
        slowest = max(slowest, time.perf_counter() - began)
    await scraping
    assert slowest < 1.0


async def test_one_is_changed_while_the_others_are_left_alone(
    many: ServerProcess, aio: grpc.aio.Channel, root: Path
) -> None:
    already = len(many.records())
    (root / NAMES[0] / "model.yaml").write_text(GAUSSIAN.format(7.0))
    load = oip.RepositoryModelLoadRequest(model_name=NAMES[0])
    await inference(aio).RepositoryModelLoad(load, timeout=TIMEOUT_S)
    answer = await denoiser(aio).Denoise(asked(X, model=NAMES[0]), timeout=TIMEOUT_S)
    assert array(answer.denoised).mean() > 3
    unload = oip.RepositoryModelUnloadRequest(model_name=NAMES[0])
    await inference(aio).RepositoryModelUnload(unload, timeout=TIMEOUT_S)
    assert await index(aio) == {**dict.fromkeys(NAMES, "READY"), NAMES[0]: "UNAVAILABLE"}
    await inference(aio).RepositoryModelLoad(load, timeout=TIMEOUT_S)
    loaded = [one for one in many.records()[already:] if one["event"] == "model loaded"]
    assert [one["model"] for one in loaded] == [NAMES[0]] * 2
