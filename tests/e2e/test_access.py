"""Who gets in at a real server: tokens, roles, callers from elsewhere, addresses it may bind."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2
from grpc_channelz.v1.channelz_pb2_grpc import ChannelzStub
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from tests.support.bad_requests import denoise, sample
from tests.support.processes import COMMAND, ServerProcess, run, serving
from tests.support.refusals import TIMEOUT_S, refused
from tests.support.security import Certificates, TokenFile, bearing, healthy

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_proto.inference import grpc_service_pb2 as inference_pb
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from els_service.server.security.rejection_pace import AT_ONCE, DELAY_S
from els_service.server.security.reloaded_file import STALE

Metadata = tuple[tuple[str, str], ...]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    return TokenFile(tmp_path_factory.mktemp("tokens") / "tokens.json")


@pytest.fixture(scope="module")
def infer(file: TokenFile) -> Metadata:
    return bearing(file.add("reader"))


@pytest.fixture(scope="module")
def admin(file: TokenFile) -> Metadata:
    return bearing(file.add("boss", "admin"))


@pytest.fixture(scope="module")
def guarded(
    models: Path, file: TokenFile, infer: Metadata, admin: Metadata
) -> Iterator[ServerProcess]:
    """A server with tokens and channelz."""
    with serving("--models", models, "--tokens", file.path, ELS_CHANNELZ="true") as process:
        yield process


@pytest.fixture(scope="module")
def inside(guarded: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(guarded.target) as channel:
        yield channel


def reflect(channel: grpc.Channel, metadata: Metadata = ()) -> Any:
    stub: Any = ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    return list(stub.ServerReflectionInfo(requests, timeout=TIMEOUT_S, metadata=metadata))


def servers(channel: grpc.Channel, metadata: Metadata = ()) -> Any:
    stub: Any = ChannelzStub(channel)
    request = channelz_pb2.GetServersRequest()
    return stub.GetServers(request, timeout=TIMEOUT_S, metadata=metadata).server


def ask(channel: grpc.Channel, metadata: Metadata = ()) -> pb.DenoiseResponse:
    stub = DenoiserServiceStub(channel)
    return stub.Denoise(denoise(), timeout=TIMEOUT_S, metadata=metadata)


def administer(channel: grpc.Channel, metadata: Metadata = ()) -> list[grpc.StatusCode]:
    """Return how each method of administration ends; what it asks for is refused anyway."""
    stub, strange = GRPCInferenceServiceStub(channel), "no-such-model"
    calls: list[tuple[Any, Any]] = [
        (
            stub.RepositoryModelLoad,
            inference_pb.RepositoryModelLoadRequest(model_name=strange),
        ),
        (
            stub.RepositoryModelUnload,
            inference_pb.RepositoryModelUnloadRequest(model_name=strange),
        ),
        (stub.LogSettings, inference_pb.LogSettingsRequest()),
    ]
    ended = [call.future(request, timeout=TIMEOUT_S, metadata=metadata) for call, request in calls]
    return [future.code() for future in ended]


def test_with_a_token_a_call_is_answered_and_without_a_known_one_it_is_not(
    inside: grpc.Channel, infer: Metadata, admin: Metadata
) -> None:
    for metadata in (infer, admin):
        assert ask(inside, metadata).denoised.data
    stub = DenoiserServiceStub(inside)
    for metadata in ((), bearing("els_unknown"), (("authorization", "Basic dTpw"),)):
        for call in (
            refused(partial(ask, inside, metadata)),
            refused(partial(stub.Sample, sample(), metadata=metadata)),
            refused(partial(reflect, inside, metadata)),
            refused(partial(servers, inside, metadata)),
        ):
            assert call.code() is grpc.StatusCode.UNAUTHENTICATED
            assert call.details().startswith("authorization: expected ")
        assert set(administer(inside, metadata)) == {grpc.StatusCode.UNAUTHENTICATED}


def test_probes_need_no_token(inside: grpc.Channel) -> None:
    assert healthy(inside)


def test_reflection_needs_any_token_and_channelz_the_role_admin(
    inside: grpc.Channel, infer: Metadata, admin: Metadata
) -> None:
    assert reflect(inside, infer)
    assert len(servers(inside, admin)) == 1
    call = refused(lambda: servers(inside, infer))
    assert call.code() is grpc.StatusCode.PERMISSION_DENIED


def test_administration_needs_the_role_admin(
    inside: grpc.Channel, infer: Metadata, admin: Metadata
) -> None:
    assert set(administer(inside, infer)) == {grpc.StatusCode.PERMISSION_DENIED}
    refusals = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}
    assert not refusals & set(administer(inside, admin))


def test_a_call_is_rejected_before_its_message_is_read(inside: grpc.Channel) -> None:
    garbage: Any = inside.unary_unary("/denoise.v1.DenoiserService/Denoise")
    for size in (0, 3, 1 << 20):
        call = refused(partial(garbage, b"\xff" * size, timeout=TIMEOUT_S))
        assert call.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_file_that_changes_counts_within_seconds_and_a_broken_one_does_not(
    inside: grpc.Channel, file: TokenFile
) -> None:
    fresh = bearing(file.add("newcomer"))
    stop_s = time.monotonic() + TIMEOUT_S
    codes = [grpc.StatusCode.UNAUTHENTICATED]
    while codes[-1] is not grpc.StatusCode.OK and time.monotonic() < stop_s:
        future = DenoiserServiceStub(inside).Denoise.future(denoise(), metadata=fresh)
        codes.append(future.code())
    assert set(codes) == {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.OK}
    file.path.write_text(json.dumps(file.entries)[:-20])
    stop_s = time.monotonic() + 1.5
    while time.monotonic() < stop_s:
        assert ask(inside, fresh).denoised.data
    file.write()


def stale(server: ServerProcess) -> dict[str, float]:
    """Return for how long each file that is reloaded has been unusable."""
    found = re.findall(
        r'^els_reloaded_file_stale_seconds{file="(\w+)"} (\S+)$', server.page("/metrics")[1], re.M
    )
    return {name: float(seconds) for name, seconds in found}


@pytest.mark.parametrize("fault", ["emptied", "removed", "broken"])
def test_an_invalid_tokens_file_keeps_its_tokens_and_shows_in_log_and_metrics(
    guarded: ServerProcess, inside: grpc.Channel, file: TokenFile, infer: Metadata, fault: str
) -> None:
    def stale_records() -> list[dict[str, Any]]:
        return [one for one in guarded.records() if one["event"] == STALE]

    until(lambda: stale(guarded) == {"tokens": 0.0, "tls": 0.0})
    before = len(stale_records())
    if fault == "removed":
        file.path.unlink()
    else:
        file.path.write_text("[]" if fault == "emptied" else "- {name")
    try:
        until(lambda: stale(guarded)["tokens"] > 0)
        assert ask(inside, infer).denoised.data
        record = stale_records()[before]
        assert record["level"] == "error"
        assert record["files"] == str(file.path)
        assert str(file.path) in record["reason"]
        assert record["stale_since"]
    finally:
        file.write()
    until(lambda: stale(guarded)["tokens"] == 0)
    assert len(stale_records()) == before + 1


def until(true: Callable[[], bool]) -> None:
    """Ask until something is true; a file is looked at once a second."""
    stop_s = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < stop_s


def test_the_log_names_callers_and_shows_no_token(
    guarded: ServerProcess, inside: grpc.Channel, infer: Metadata
) -> None:
    stub = DenoiserServiceStub(inside)
    refused(lambda: stub.Denoise(denoise(labels=[9]), metadata=infer))
    secret = infer[0][1].removeprefix("Bearer ")
    refused(lambda: ask(inside, bearing(secret[:-1])))
    known, unknown = [one for one in guarded.records() if one["event"] == "call"][-2:]
    assert known["caller"] == "reader"
    assert (unknown["caller"], unknown["code"]) == (unknown["peer"], "UNAUTHENTICATED")
    with urlopen(guarded.metrics_url, timeout=TIMEOUT_S) as page:
        metrics = page.read().decode()
    assert 'code="UNAUTHENTICATED"' in metrics
    for text in (json.dumps(guarded.records()), metrics):
        assert secret[:-1] not in text


def test_reflection_can_be_turned_off_and_channelz_is_off_by_default(
    tmp_path: Path, models: Path, channel: grpc.Channel
) -> None:
    assert refused(lambda: servers(channel)).code() is grpc.StatusCode.UNIMPLEMENTED
    with (
        serving("--models", models, ELS_REFLECTION="false", ELS_CHANNELZ="true") as quiet,
        grpc.insecure_channel(quiet.target) as other,
    ):
        assert refused(lambda: reflect(other)).code() is grpc.StatusCode.UNIMPLEMENTED
        assert len(servers(other)) == 1


def test_a_server_beyond_loopback_without_a_guard_does_not_start() -> None:
    # Executed, so that the interpreter ends too.
    done = run(COMMAND[0], "run", "--port=0", "--metrics-port=0", "--host=0.0.0.0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "host: expected loopback, or tls_certificate and tls_key, got 0.0.0.0" in done.stderr
    assert "Traceback" not in done.stderr


def test_beyond_loopback_tls_or_insecure_is_served_and_metrics_remain_on_loopback(
    tmp_path: Path, models: Path
) -> None:
    certificates = Certificates(tmp_path)
    certificates.issue()
    for options in (["--insecure"], certificates.options):
        with serving("--models", models, "--host=0.0.0.0", *options) as server:
            home, everywhere = server.ready["metrics_port"], server.ready["grpc_port"]
            listening = addresses(server.process.pid)
            assert f"0100007F:{home:04X}" in listening
            assert {f"{zeros}:{everywhere:04X}" for zeros in ("0" * 8, "0" * 32)} & listening


def test_without_tokens_administration_is_refused_to_callers_from_elsewhere(models: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: asks which of our addresses others would see.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            # A machine without a network has no address but loopback.
            pytest.skip("no address beyond loopback")
        ours = probe.getsockname()[0]
    with serving("--models", models, "--host=0.0.0.0", "--insecure") as server:
        target = f"{ours}:{server.ready['grpc_port']}"
        with grpc.insecure_channel(target) as elsewhere:
            assert ask(elsewhere).denoised.data
            assert set(administer(elsewhere)) == {grpc.StatusCode.PERMISSION_DENIED}
        with grpc.insecure_channel(server.target) as here:
            assert grpc.StatusCode.PERMISSION_DENIED not in administer(here)


def addresses(pid: int) -> set[str]:
    """Return every local address of a process's network, as the kernel writes them."""
    tables = (Path(f"/proc/{pid}/net/{table}").read_text() for table in ("tcp", "tcp6"))
    return {line.split()[1] for table in tables for line in table.splitlines()}


def test_a_flood_of_calls_without_a_token_is_slowed(guarded: ServerProcess) -> None:
    began = time.monotonic()
    with grpc.insecure_channel(guarded.target) as channel:
        stub = DenoiserServiceStub(channel)
        for _ in range(AT_ONCE + 4):
            call = refused(lambda: stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S))
            assert call.code() is grpc.StatusCode.UNAUTHENTICATED
    seconds = time.monotonic() - began
    assert seconds >= DELAY_S * min(4, AT_ONCE + 4 - AT_ONCE * (1 + int(seconds)))
