"""What our server costs a call, against a handler that only parses, copies and serialises.

    python -m benchmarks.rpc [--seconds 2] [--rounds 10] [--out FILE]

Three servers on loopback, each a process with grpc.aio on uvloop: ours with a Gaussian model, a
handler that parses the same request, copies its tensor and serialises the same answer, and an echo
of raw bytes. One client process keeps 16 calls of a 12 KB image in flight; it sends ready-made
bytes, so that the servers are what is measured. Rounds alternate; ratios are medians of pairs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop

from benchmarks import record
from els_proto.denoise.v1 import denoise_pb2 as pb

SHAPE = (1, 3, 32, 32)
CALLERS = 16
METHOD = "/denoise.v1.DenoiserService/Denoise"
MODEL = "kind: gaussian\nshape: [3, 32, 32]\nmean: 0.0\nvariance: 0.25\n"


def request() -> bytes:
    """Return the bytes of one call: a 12 KB image."""
    x = np.random.default_rng(0).standard_normal(SHAPE).astype("<f4")
    tensor = pb.Tensor(dtype=pb.DTYPE_F32, shape=SHAPE, data=x.tobytes())
    level = pb.NoiseLevel(sigma=[0.5])
    return pb.DenoiseRequest(model="gaussian", x=tensor, level=level).SerializeToString()


@contextmanager
def our_server() -> Iterator[int]:
    """Yield the port of a real ``els-server`` with one Gaussian model."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "gaussian"
        folder.mkdir()
        (folder / "model.yaml").write_text(MODEL)
        command = (Path(sys.executable).with_name("els-server"), "run", "--models", root)
        server = subprocess.Popen(
            (*command, "--port=0", "--metrics-port=0"), stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        try:
            yield int(json.loads(server.stdout.readline())["grpc_port"])
        finally:
            server.terminate()
            server.wait()


@contextmanager
def peer_server(name: str) -> Iterator[int]:
    """Yield the port of a bare handler in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_serve_peer, args=(name, there))
    child.start()
    try:
        yield here.recv()
    finally:
        child.terminate()
        child.join()


def _serve_peer(name: str, pipe: Connection) -> None:
    async def run() -> None:
        server = grpc.aio.server()
        handler = PEERS[name]
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("denoise.v1.DenoiserService", handler())]
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        pipe.send(port)
        await server.wait_for_termination()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def _parse_and_copy() -> dict[str, Any]:
    async def denoise(message: pb.DenoiseRequest, context: Any) -> pb.DenoiseResponse:
        x = np.frombuffer(message.x.data, "<f4").copy()
        tensor = pb.Tensor(dtype=pb.DTYPE_F32, shape=message.x.shape, data=x.tobytes())
        return pb.DenoiseResponse(denoised=tensor)

    handler = grpc.unary_unary_rpc_method_handler(
        denoise, pb.DenoiseRequest.FromString, pb.DenoiseResponse.SerializeToString
    )
    return {"Denoise": handler}


def _echo() -> dict[str, Any]:
    async def denoise(message: bytes, context: Any) -> bytes:
        return message

    return {"Denoise": grpc.unary_unary_rpc_method_handler(denoise)}


PEERS = {"parse_copy": _parse_and_copy, "echo": _echo}


async def _load(port: int, seconds: float) -> float:
    """Return calls a second of ``CALLERS`` callers in a closed loop."""
    body, calls = request(), 0
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        await call(body)
        start = time.perf_counter()

        async def caller() -> None:
            nonlocal calls
            while time.perf_counter() - start < seconds:
                await call(body)
                calls += 1

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return calls / (time.perf_counter() - start)


def main() -> None:
    """Alternate the servers, print medians and ratios, write a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of every server")
    parser.add_argument("--out", type=Path, help="where the record goes")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"ours": [], "parse_copy": [], "echo": []}
    with ExitStack() as stack, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        ports = {"ours": stack.enter_context(our_server())}
        ports |= {name: stack.enter_context(peer_server(name)) for name in PEERS}
        for _ in range(options.rounds):
            for name, port in ports.items():
                rates[name].append(runner.run(_load(port, options.seconds)))
    row: dict[str, Any] = {name: statistics.median(values) for name, values in rates.items()}
    for peer in PEERS:
        pairs = zip(rates["ours"], rates[peer], strict=True)
        row[f"ratio_to_{peer}"] = statistics.median(ours / theirs for ours, theirs in pairs)
    row |= {"callers": CALLERS, "rounds": options.rounds, "seconds": options.seconds}
    for name, value in row.items():
        print(f"{name:>22} {value:10.3f}")
    print(f"record: {record.write('rpc', [row], options.out)}")


if __name__ == "__main__":
    main()
