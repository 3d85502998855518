"""The repository over gRPC: index, load, unload, versions, hot reload and memory under load."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from safetensors.torch import save_file
from tests.support.messages import denoiser, inference
from tests.support.models_folder import tiny_bank, write_models
from tests.support.processes import ServerProcess, serving
from tests.support.refusals import TIMEOUT_S, assert_refused
from tests.support.repository_calls import X, answer, health, index, load, refusal, unload, until

from els_client import AsyncClient
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as oip
from els_service.denoisers.banks import save_bank

OVER_A = "kind: analytic\nmachine: els\nbank: ../_banks/a.safetensors\n"
BANKS, BUDGET = 6, 20_000
SIX = {f"own-{i}": OVER_A.replace("a.s", f"{i}.s") for i in range(BANKS)}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def write_bank(root: Path, name: str, seed: int, images: int = 12) -> None:
    save_bank(tiny_bank(images, seed), root / "_banks" / f"{name}.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository") / "models"
    write_models(root, {"hot": OVER_A, "calm": OVER_A})
    write_bank(root, "a", seed=1)
    return root


@pytest.fixture(scope="module")
def own(root: Path) -> Iterator[ServerProcess]:
    """A server whose models these tests change; each leaves ``hot`` as it found it."""
    with serving("--models", root, "--threads", 1) as process:
        yield process


@pytest.fixture
async def aio(own: ServerProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(own.target) as channel:
        yield channel


@pytest.fixture
def reset(root: Path) -> Iterator[None]:
    yield
    write_bank(root, "a", seed=1)
    (root / "hot" / "model.yaml").write_text(OVER_A)


@pytest.mark.usefixtures("reset")
async def test_hot_reload_under_load_fails_no_call_and_never_mixes_two_models(
    own: ServerProcess, aio: grpc.aio.Channel, root: Path
) -> None:
    settings = [(bank, window) for bank in (2, 3) for window in ("3", "5", "auto")]
    expected = {await answer(aio)}

    async def reload_often() -> None:
        for bank, window in settings * 3:
            write_bank(root, "a", seed=bank)
            (root / "hot" / "model.yaml").write_text(f"{OVER_A}window: {window}\n")
            await load(aio)
            expected.add(await answer(aio))

    async with AsyncClient(own.target) as client:
        answers = await until(
            asyncio.ensure_future(reload_often()),
            lambda: client.denoise(X, model="hot", sigma=1.0),
        )
    seen = {x.tobytes() for x in answers}
    assert len(expected) == 1 + len(settings)
    assert seen <= expected
    assert len(seen) > 3
    assert len(answers) > 100


@pytest.mark.usefixtures("reset")
async def test_a_trajectory_ends_with_the_model_that_it_began_with(
    aio: grpc.aio.Channel, root: Path
) -> None:
    request = pb.SampleRequest(model="hot", count=2, steps=30, seed=4, return_x=True)
    expected = [step async for step in denoiser(aio).Sample(request, timeout=TIMEOUT_S)]
    call = denoiser(aio).Sample(request, timeout=TIMEOUT_S)
    steps = [await call.read()]
    write_bank(root, "a", seed=5)
    await load(aio)
    await unload(aio)
    while (step := await call.read()) is not grpc.aio.EOF:
        steps.append(step)
    assert steps == expected
    write_bank(root, "a", seed=1)
    await load(aio)


async def test_a_token_is_refused_by_another_model_under_the_same_name_and_version(
    aio: grpc.aio.Channel, root: Path, reset: None
) -> None:
    request = pb.SampleRequest(model="hot", steps=3, return_resume_token=True)
    steps = [step async for step in denoiser(aio).Sample(request, timeout=TIMEOUT_S)]
    request.resume_token = steps[0].resume_token
    await load(aio)  # the same content anew
    again = [step async for step in denoiser(aio).Sample(request, timeout=TIMEOUT_S)]
    assert again == steps[1:]
    write_bank(root, "a", seed=6)
    await load(aio)
    call = denoiser(aio).Sample(request, timeout=TIMEOUT_S)
    error = await refusal(call.read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith("resume_token: ")
    write_bank(root, "a", seed=1)


async def test_a_token_is_refused_once_the_files_of_its_model_hold_other_numbers(
    aio: grpc.aio.Channel, root: Path
) -> None:
    folder = root / "changing"
    folder.mkdir()
    document = "kind: gaussian\nshape: [1, 2, 2]\nmean: mean.safetensors\nvariance: {}\n"
    request = pb.SampleRequest(model="changing", steps=3, return_resume_token=True)
    for mean, variance in ((0.0, 1.0), (0.5, 1.0), (0.5, 2.0)):
        save_file({"mean": torch.full((1, 2, 2), mean)}, folder / "mean.safetensors")
        (folder / "model.yaml").write_text(document.format(variance))
        await load(aio, "changing")
        if request.resume_token:
            error = await refusal(denoiser(aio).Sample(request, timeout=TIMEOUT_S).read())
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "a token of this very request" in str(error.details())
            request.resume_token = b""
        steps = [step async for step in denoiser(aio).Sample(request, timeout=TIMEOUT_S)]
        request.resume_token = steps[0].resume_token
    # The same numbers under another version.
    shutil.copytree(folder, folder / "2")
    await load(aio, "changing")
    for version, code in (("1", "OK"), ("2", "INVALID_ARGUMENT"), ("", "INVALID_ARGUMENT")):
        request.version = version
        call = denoiser(aio).Sample(request, timeout=TIMEOUT_S)
        if code == "OK":
            assert [step async for step in call] == steps[1:]
        else:
            assert (await refusal(call.read())).code().name == code
    await unload(aio, "changing")
    shutil.rmtree(folder)
    await load(aio)


async def test_calls_during_an_unload_succeed_or_are_not_found_and_health_follows(
    own: ServerProcess, aio: grpc.aio.Channel
) -> None:
    expected = await answer(aio)
    stub: Any = HealthStub(aio)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="hot"), timeout=60)
    assert (await watch.read()).status == SERVING

    async def off_and_on() -> None:
        for _ in range(3):
            await unload(aio)
            assert await index(aio, ready=True) == {("calm", "1"): ("READY", "")}
            assert (await index(aio))["hot", "1"] == ("UNAVAILABLE", "unloaded")
            assert (await watch.read()).status == NOT_SERVING
            ready = oip.ModelReadyRequest(name="hot")
            assert not (await inference(aio).ModelReady(ready, timeout=TIMEOUT_S)).ready
            await load(aio)
            assert (await watch.read()).status == SERVING
            assert await answer(aio) == expected

    async def ask() -> bytes | str:
        try:
            return await answer(aio)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name} {error.details()}"

    answers = await until(asyncio.ensure_future(off_and_on()), ask, callers=4)
    told = {text for text in answers if isinstance(text, str)}
    assert told <= {
        "NOT_FOUND model: hot is unloaded",
        "UNAVAILABLE model: hot is being loaded",  # a client asks again
    }
    assert {x for x in answers if isinstance(x, bytes)} == {expected}
    assert await health(aio, "") == SERVING
    watch.cancel()


@pytest.mark.usefixtures("reset")
@pytest.mark.parametrize("broken", ["kind: analytic\nmachine: x\n", "{", "bank"])
async def test_a_broken_model_is_refused_by_file_and_the_old_one_serves_on(
    aio: grpc.aio.Channel, root: Path, broken: str
) -> None:
    expected = await answer(aio)
    file = root / "hot" / "model.yaml"
    if broken == "bank":
        file = root / "_banks" / "a.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.write_text(broken)
    error = await refusal(load(aio))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert str(file) in str(error.details())
    assert await answer(aio) == expected
    assert (await index(aio))["hot", "1"] == ("READY", "")
    assert await health(aio, "hot") == SERVING


async def test_a_new_model_is_found_loaded_refused_and_found_again(
    aio: grpc.aio.Channel, root: Path
) -> None:
    (root / "late").mkdir()
    document = root / "late" / "model.yaml"
    document.write_text("kind: nothing\n")
    assert (await index(aio))["late", "1"] == ("UNAVAILABLE", "not loaded")
    error = await refusal(load(aio, "late"))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    state, reason = (await index(aio))["late", "1"]
    assert state == "UNAVAILABLE"
    assert str(document) in reason
    assert await health(aio, "late") == NOT_SERVING
    error = await refusal(answer(aio, model="late"))
    assert (error.code().name, error.details()) == (
        "NOT_FOUND",
        "model: late failed to load",
    )
    document.write_text(OVER_A)
    await load(aio, "late")
    assert await health(aio, "late") == SERVING
    assert await answer(aio, model="late") == await answer(aio, model="calm")
    document.unlink()
    await unload(aio, "late")
    assert ("late", "1") not in await index(aio)


async def test_versions_serve_side_by_side_and_a_broken_new_one_changes_nothing(
    aio: grpc.aio.Channel, root: Path
) -> None:
    for version, window in (("1", 3), ("2", 5), ("10", 1)):
        (root / "many" / version).mkdir(parents=True)
        document = OVER_A.replace("..", "../..") + f"window: {window}\n"
        (root / "many" / version / "model.yaml").write_text(document)
    await load(aio, "many")
    answers = {v: await answer(aio, v, model="many") for v in ("1", "2", "10", "")}
    assert answers[""] == answers["10"]
    assert len(set(answers.values())) == 3
    request = pb.GetModelRequest(name="many", version="2")
    model = (await denoiser(aio).GetModel(request, timeout=TIMEOUT_S)).model
    assert (model.version, list(model.window.k)) == ("2", [5])
    for unknown in ("3", "x", "-1"):
        error = await refusal(answer(aio, unknown, model="many"))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "expected 1, 2, 10" in str(error.details())
    (root / "many" / "11").mkdir()
    (root / "many" / "11" / "model.yaml").write_text("kind: nothing\n")
    error = await refusal(load(aio, "many"))
    assert str(root / "many" / "11" / "model.yaml") in str(error.details())
    assert {v: await answer(aio, v, model="many") for v in answers} == answers
    (root / "many" / "11" / "model.yaml").unlink()
    (root / "many" / "10" / "model.yaml").unlink()
    await load(aio, "many")
    assert await answer(aio, model="many") == answers["2"]
    await unload(aio, "many")


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("RepositoryModelLoad", oip.RepositoryModelLoadRequest(model_name="x"), "NOT_FOUND"),
        ("RepositoryModelLoad", oip.RepositoryModelLoadRequest(model_name="../a"), "NOT_FOUND"),
        ("RepositoryModelLoad", oip.RepositoryModelLoadRequest(), "NOT_FOUND"),
        ("RepositoryModelUnload", oip.RepositoryModelUnloadRequest(model_name="x"), "NOT_FOUND"),
        ("ModelConfig", oip.ModelConfigRequest(name="x"), "NOT_FOUND"),
        ("ModelConfig", oip.ModelConfigRequest(name="hot", version="2"), "NOT_FOUND"),
        ("ModelStatistics", oip.ModelStatisticsRequest(name="x"), "NOT_FOUND"),
        ("RepositoryIndex", oip.RepositoryIndexRequest(repository_name="x"), "INVALID_ARGUMENT"),
    ],
)
async def test_unknown_models_are_not_found(
    aio: grpc.aio.Channel, method: str, request_: Any, code: str
) -> None:
    error = await refusal(getattr(inference(aio), method)(request_, timeout=TIMEOUT_S))
    assert error.code().name == code


def _log(name: str, **value: Any) -> oip.LogSettingsRequest:
    setting = oip.LogSettingsRequest.SettingValue(**value)
    return oip.LogSettingsRequest(settings={name: setting})


@pytest.mark.parametrize(
    ("request_", "field", "expected", "got"),
    [
        (_log("log_file", string_param="/a"), "settings", "one of log_level", "'log_file'"),
        (_log("log_level", string_param="x"), "settings.log_level", "one of debug", "x"),
        (_log("log_level", uint32_param=1), "settings.log_level", "string_param", "uint32_param"),
        (_log("log_info"), "settings.log_info", "bool_param", "nothing"),
        (_log("log_error", bool_param=False), "settings.log_error", "true", "false"),
    ],
)
async def test_a_setting_of_the_log_that_there_is_not_is_refused(
    aio: grpc.aio.Channel, request_: Any, field: str, expected: str, got: str
) -> None:
    error: Any = await refusal(inference(aio).LogSettings(request_, timeout=TIMEOUT_S))
    assert_refused(error, "INVALID_ARGUMENT", field, expected, got)


async def test_models_that_do_not_fit_the_memory_at_once_are_all_answered(
    tmp_path: Path,
) -> None:
    root = write_models(tmp_path / "models", SIX)
    for i in range(BANKS):
        write_bank(root, str(i), seed=i, images=60)
    with serving("--models", root, "--threads", 1, ELS_MEMORY_BYTES=str(BUDGET)) as server:
        async with grpc.aio.insecure_channel(server.target) as channel:
            model = (
                await denoiser(channel).GetModel(
                    pb.GetModelRequest(name="own-0"), timeout=TIMEOUT_S
                )
            ).model
            assert BUDGET / BANKS < model.memory_bytes < BUDGET  # some of them, but not all
            expected = {name: await answer(channel, model=name) for name in SIX}
            assert len(set(expected.values())) == BANKS
            order = itertools.cycle(list(SIX))

            async def ask() -> bool:
                name = next(order)
                return await answer(channel, model=name) == expected[name]

            async def a_while() -> None:
                await asyncio.gather(*(asks(25) for _ in range(4)))

            async def asks(count: int) -> None:
                for _ in range(count):
                    await ask()

            assert all(await until(asyncio.ensure_future(a_while()), ask, callers=12))
            states = await index(channel)
            assert {state for state, _ in states.values()} == {"READY"}
            asleep = [name for (name, _), (_, reason) in states.items() if reason]
            assert 0 < len(asleep) < BANKS
            statistics = await inference(channel).ModelStatistics(
                oip.ModelStatisticsRequest(), timeout=TIMEOUT_S
            )
            counts = {model.name: model.inference_count for model in statistics.model_stats}
            assert counts.keys() == SIX.keys()
            assert min(counts.values()) >= 4 * len(X)
            drawn = pb.SampleRequest(model=asleep[0], steps=3)
            steps = [s.index async for s in denoiser(channel).Sample(drawn, timeout=TIMEOUT_S)]
            assert steps == [1, 2, 3]
        assert [r for r in server.records() if r["level"] in ("warning", "error")] == []
