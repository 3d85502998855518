"""The path of a unary ``Denoise`` that docs/architecture.md draws, compared with a traced call."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
from tests.support.bad_requests import denoise, tensor
from tests.support.models_folder import write_models
from tests.support.security import TokenFile

import els_service
from els_proto.denoise.v1.denoise_pb2 import NoiseLevel
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_service.config import Settings
from els_service.server.server import Server

ROOT = Path(els_service.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
HOP = re.compile(r"^ +\d+ +(\S+\.py) +([\w.<>]+)(?:, ([\w.<>]+))?", re.MULTILINE)
"""Number, file, and one or two functions."""
TIMEOUT_S = 20
Call = tuple[str, str]
"""File below ``els_service``, qualified name of the function."""


def drawn() -> list[Call]:
    section = PAGE.read_text().partition("## Path of a unary `Denoise`")[2].partition("\n## ")[0]
    return [(file, name) for file, *names in HOP.findall(section) for name in names if name]


def is_call(made: Call, hop: Call) -> bool:
    (file, qualified_name), (drawn_file, name) = made, hop
    return file == drawn_file and f".{qualified_name}".endswith(f".{name}")


@contextmanager
def traced() -> Iterator[list[Call]]:
    """Yield the calls of the service's functions in this thread, in order."""
    calls: list[Call] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            calls.append((str(path.relative_to(ROOT)), frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def first_missing(hops: list[Call], calls: list[Call]) -> Call | None:
    """Return the first hop without a call after the one of the hop before it."""
    rest = iter(calls)
    return next((hop for hop in hops if not any(is_call(made, hop) for made in rest)), None)


async def test_a_denoise_call_takes_the_path_that_the_documentation_draws(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    metadata = [("authorization", f"Bearer {tokens.add('reader')}")]
    models = write_models(tmp_path / "models")
    server = Server(Settings(models=models, tokens=tokens.path, port=0, metrics_port=0, threads=1))
    ports = await server.start()
    missing = []
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc_port}") as channel:
            stub: Any = DenoiserServiceStub(channel)
            # The first call validates the form; a call on a busy machine may be queued instead.
            for sigma in range(1, 40):
                x = tensor(shape=(1, 3, 32, 32), data=bytes(12 << 10))
                request = denoise(model="gaussian", x=x, level=NoiseLevel(sigma=[sigma]))
                with traced() as calls:
                    await stub.Denoise(request, metadata=metadata, timeout=TIMEOUT_S)
                missing.append(first_missing(drawn(), calls))
                if missing[-1] is None:
                    break
    finally:
        await server.close()
    assert len(drawn()) >= 20
    assert missing[-1] is None
