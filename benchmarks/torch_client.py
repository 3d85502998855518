"""Measures what ``RemoteDenoiser`` adds to a call of the plain client, and writes a record.

    python -m benchmarks.torch_client [--rounds 20] [--calls 100] [--out FILE.json]

One blocking caller asks a Gaussian model for D of one image of 12 KB, its level changing with every
call: by ``Client.denoise`` from numpy to numpy, by the same between tensors as a caller would write
it, and by ``RemoteDenoiser``, without a gradient and recording one. Rounds alternate; the median of
each round's ratio to the plain client, with its extremes. Answers that differ are not timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks import record
from benchmarks.service.messages import MODEL
from benchmarks.service.servers import els_server
from els_client import Client, UnavailableError
from els_client.torch import RemoteDenoiser

TARGET = 1.10
_START_S = 60


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every row, then write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of alternating timed calls")
    parser.add_argument("--calls", type=int, default=100, help="of each way in a round")
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    recorder = record.start("torch-client", options)
    with els_server() as server, Client(f"127.0.0.1:{server.port}") as client:
        _wait_for(client)
        rows = measured(client, options.rounds, options.calls)
    for row in rows:
        print(json.dumps(row))
    print(f"record: {recorder.write(rows)}")


def measured(client: Client, rounds: int, calls: int) -> list[dict[str, Any]]:
    """Return a row for each way to ask."""
    denoiser = RemoteDenoiser(client, MODEL)
    tensor = torch.randn(1, *denoiser.info.shape, generator=torch.Generator().manual_seed(0))
    array, tracked = tensor.numpy(), tensor.clone().requires_grad_()

    def by_tensors(sigma: float) -> torch.Tensor:
        found = client.denoise(tensor.numpy(), model=MODEL, sigma=sigma)
        return torch.from_numpy(found)

    ways: dict[str, Callable[[float], Any]] = {
        "client": lambda sigma: client.denoise(array, model=MODEL, sigma=sigma),
        "client between tensors": by_tensors,
        "RemoteDenoiser": lambda sigma: denoiser(tensor, sigma),
        "RemoteDenoiser with a gradient": lambda sigma: denoiser(tracked, sigma),
    }
    answers = [torch.as_tensor(ask(0.5)).detach() for ask in ways.values()]
    if not all(torch.equal(answer, answers[0]) for answer in answers):
        raise SystemExit("the ways give different answers: nothing is timed")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, ask in ways.items():
            begin = time.perf_counter()
            for call in range(calls):
                ask(0.1 + 0.001 * call + 0.01 * number)
            seconds[name].append((time.perf_counter() - begin) / calls)
    return [_row(name, found, seconds["client"], tensor) for name, found in seconds.items()]


def _row(
    name: str, seconds: list[float], plain: list[float], tensor: torch.Tensor
) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(seconds, plain, strict=True)]
    return {
        "way": name,
        "bytes": tensor.nbytes,
        "ms": round(1e3 * median(seconds), 4),
        "ratio": round(median(ratios), 4),
        "extremes": [round(min(ratios), 4), round(max(ratios), 4)],
        "within_target": median(ratios) <= TARGET,
    }


def _wait_for(client: Client) -> None:
    """Return when the server answers."""
    end = time.monotonic() + _START_S
    while True:
        try:
            client.model(MODEL)
            return
        except UnavailableError:
            if time.monotonic() > end:
                raise


if __name__ == "__main__":
    main()
