"""Scenario of an event: three replicas, a route to them, and a load as a share of capacity."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import uvloop

from benchmarks import record
from benchmarks.deploy import envoy
from benchmarks.deploy.load import Observed, around, capacity_per_s
from benchmarks.deploy.replicas import Fleet, fleet

WAYS = ("client", "envoy")
REPLICAS = 3
_CALLERS = 16
_CAPACITY_S = 5.0


@contextmanager
def targets(ways: tuple[str, ...], behind: Fleet) -> Iterator[dict[str, str]]:
    """Yield the client target of each route in ``WAYS`` to a fleet."""
    with ExitStack() as stack:
        yield {
            way: stack.enter_context(envoy.in_front_of(behind)) if way == "envoy" else behind.target
            for way in ways
        }


@dataclass(frozen=True)
class Scenario:
    """A fleet, the route to it, and its load."""

    fleet: Fleet
    way: str
    target: str
    share: float
    steady_s: float

    async def around(self, event: Callable[[], Awaitable[None]]) -> tuple[Observed, dict[str, Any]]:
        """Return the observations of callers around an event, and the row of a record."""
        capacity = await capacity_per_s(self.target, callers=_CALLERS, seconds=_CAPACITY_S)
        rate = self.share * capacity
        observed = await around({self.way: self.target}, rate, event, steady_s=self.steady_s)
        row = {
            "way": self.way,
            "replicas": REPLICAS,
            "capacity_per_s": round(capacity, 1),
            "rate_per_s": round(rate, 1),
            **observed[self.way].facts(),
        }
        return observed[self.way], row


Event = Callable[[Scenario], Awaitable[dict[str, Any]]]


def run_events(name: str, about: str | None, events: list[Event]) -> None:
    """Run each event on every route of the command line, and write a record.

    Args:
        name: name of the record.
        about: description of the command.
        events: events; each has its own fleet and returns a row.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS, help="default: both")
    parser.add_argument("--share", type=float, default=0.25, help="load as a share of the capacity")
    parser.add_argument("--steady-seconds", type=float, default=10.0, help="before the event")
    record.add_arguments(parser)
    options = parser.parse_args()
    recorder = record.start(f"deploy-{name}", options)
    rows = []
    for way in options.ways:
        for each in events:
            with fleet(REPLICAS) as behind, targets((way,), behind) as found:
                scenario = Scenario(behind, way, found[way], options.share, options.steady_seconds)
                rows.append(uvloop.run(_run(each, scenario)))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    print(f"record: {recorder.write(rows)}")


async def _run(each: Event, scenario: Scenario) -> dict[str, Any]:
    return await each(scenario)
