"""Plan of a load: callers or rate, requests, and duration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from els_client._channel import MAX_TIMEOUT_S
from els_client._types import Tls
from els_client.errors import InvalidArgumentError, Violation

Kind: TypeAlias = Literal["denoise", "score", "sample"]
_A_YEAR = f"at most {MAX_TIMEOUT_S:.0f} (a year)"
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A load on one model of one server; the defaults are small.

    With ``callers`` the loop is closed: each caller calls again after its response. With
    ``rate_per_s`` it is open: calls start at random times (a Poisson process) independent of
    earlier ones, and latency counts from the scheduled start of a call.

    Attributes:
        name: Name of the load in the report.
        target: Address of the server.
        tls: TLS options; None means plaintext.
        token: Bearer token; not in reports.
        model: Name of the model.
        version: Version of the model; None means the newest.
        callers: Calls in flight of a closed loop, over all processes.
        rate_per_s: Calls per second of an open loop, over all processes.
        mix: Relative frequency of each kind.
        stream: Whether denoise uses ``DenoiseStream``, one stream per connection.
        images: Images per call.
        sigma: Minimum and maximum noise level σ; log-uniform for each image.
        label: Label of all images; None means unconditional.
        window: Odd side of the patch in pixels; None means the model's own.
        steps: Steps of a sample.
        processes: Load processes, at most one for each caller.
        connections: Connections per process.
        warm_up_s: Duration of the load before measurement.
        duration_s: Duration of the measurement, in which calls are started.
        count: Maximum calls started after the warm-up; None means limited by time only.
        deadline_s: Deadline of a call, sent with it.
        grace_s: Additional time for late responses; samples have none, as their deadline is that of
            the gRPC call.
        drain_s: Maximum wait for responses at the end.
        priority: 1 (highest) to ``Limits.priority_levels``; None means the server's default.
        seed: Seed of arrivals, kinds, pixels and levels.
    """

    name: str = "load"
    target: str = "127.0.0.1:50051"
    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    model: str = "fashion-els"
    version: str | None = None
    callers: int | None = None
    rate_per_s: float | None = None
    mix: Mapping[Kind, float] = field(default_factory=lambda: {"denoise": 1.0})
    stream: bool = False
    images: int = 1
    sigma: tuple[float, float] = (0.1, 10.0)
    label: int | None = None
    window: int | None = None
    steps: int = 20
    processes: int = 1
    connections: int = 1
    warm_up_s: float = 1.0
    duration_s: float = 10.0
    count: int | None = None
    deadline_s: float | None = None
    grace_s: float = 1.0
    drain_s: float = 60.0
    priority: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the plan.

        Raises:
            InvalidArgumentError: A field is invalid; names field, expected and got.
        """
        _expect(
            (self.callers is None) != (self.rate_per_s is None),
            "callers",
            "either callers or rate_per_s",
            f"{self.callers} and {self.rate_per_s}",
        )
        counts = ("callers", "rate_per_s", "images", "steps", "processes", "connections")
        for name in (*counts, "duration_s", "count", "deadline_s"):
            value = getattr(self, name)
            _expect(value is None or value > 0, name, "more than 0", value)
        for name in ("warm_up_s", "grace_s", "drain_s"):
            _expect(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("duration_s", "deadline_s", "warm_up_s", "grace_s", "drain_s"):
            value = getattr(self, name)
            _expect(value is None or value <= MAX_TIMEOUT_S, name, _A_YEAR, value)
        low, high = self.sigma
        _expect(0 < low <= high, "sigma", "0 < low <= high", f"{low} and {high}")
        known = set(self.mix) <= set(KINDS)
        sound = known and min(self.mix.values(), default=0) >= 0 and sum(self.mix.values()) > 0
        _expect(sound, "mix", f"a weight for any of {', '.join(KINDS)}", dict(self.mix))
        if self.callers is not None:
            _expect(self.processes <= self.callers, "processes", "at most callers", self.processes)
        if self.count is not None:
            _expect(self.processes <= self.count, "processes", "at most count", self.processes)

    def facts(self) -> dict[str, Any]:
        """Return the fields of the plan for a report, without token and TLS files."""
        hidden = ("token", "tls")
        facts = {name: value for name, value in vars(self).items() if name not in hidden}
        return facts | {"mix": dict(self.mix), "tls": self.tls is not None}


def _expect(sound: bool, name: str, expected: str, got: object) -> None:
    if not sound:
        text = f"expected {expected}, got {got}"
        raise InvalidArgumentError(f"{name}: {text}", [Violation(name, text)])


def share(total: int, index: int, parts: int) -> int:
    """Return the share of ``total`` of part ``index`` of ``parts``."""
    return total // parts + (index < total % parts)
