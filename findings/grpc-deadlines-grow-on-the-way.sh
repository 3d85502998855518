#!/usr/bin/env bash
# Guess: a gRPC server has at most as long as its caller waits, a little less for the journey.
#
# Real behaviour: gRPC's core sends a timeout with three significant digits and rounds it UP: by 1 to 2 ms
# below a second, to 10 ms below ten, to 100 ms below a hundred, and so on. So
# `context.time_remaining()` is up to 1 % MORE than the caller has: a call with timeout=10.01 arrives
# with 10.1 s. A server that plans by it (admission, batching "just in time") finishes answers that
# nobody waits for any more, and its caller's DEADLINE_EXCEEDED meets its OK.
# Version: grpcio 1.85.3, Linux x86-64, CPython 3.11.
# Source: class Timeout of gRPC core, src/core/lib/transport/timeout_encoding.cc; the protocol
# ("gRPC over HTTP/2", TimeoutValue) has up to eight
# digits, so the loss is the implementation's choice, not the protocol's.
# Bitten: servers with deadline-aware queues; tests that compare the two clocks.
#
# Output seen:
#   timeout  0.5005 s: server was given  0.5020 s
#   timeout  1.0010 s: server was given  1.0100 s
#   timeout 10.0100 s: server was given 10.1000 s
#
# Exits 1 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet grpcio==1.85.3
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

given = []


class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        def answer(request, context):
            # What is sent is in the header, to the digit; time_remaining() is that, less the way.
            given.append(context.time_remaining())
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


server = grpc.server(ThreadPoolExecutor(1))
server.add_generic_rpc_handlers((Handler(),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
longer = 0
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    call = channel.unary_unary("/test.Service/Call")
    call(b"", timeout=5)  # connects
    for timeout in (0.5005, 1.001, 10.01):
        best = -1.0
        for _ in range(20):
            given.clear()
            call(b"", timeout=timeout)
            best = max(best, given[0])
        # Less than a millisecond was lost on the way.
        print(f"timeout {timeout:7.4f} s: server was given {round(best + 4e-4, 3):7.4f} s")
        longer += best > timeout
server.stop(None)
sys.exit(0 if longer >= 2 else 1)
PYTHON
