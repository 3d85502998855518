"""Report of a load: counts, rates and latencies, summed over its processes."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from els_client.bench.plan import Plan
from els_client.bench.tally import Histogram, histogram

_PERCENTILES = {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "p999_ms": 99.9}


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Latencies of successful calls in milliseconds; all 0 if there were none."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of the calls scheduled between warm-up and end.

    Attributes:
        calls: Number of calls.
        ok: Successful calls, in time or late.
        good: Successful calls before the deadline, if there is one.
        late: Successful calls after the deadline.
        latest_ms: Maximum delay of a response after the deadline.
        errors: Status → number of calls. In addition to those of gRPC: MALFORMED, an invalid
            response; UNFINISHED, cancelled after the end; UNSENT, not sent for lack of capacity.
        latency: Latencies of successful calls; of an open loop from the scheduled start.
        first: Times of these calls until their first message: of a sample that of its first step,
            else the response.
        histogram: Latencies in µs, in HdrHistogram's encoding.
        first_histogram: The same of ``first``.
    """

    calls: int
    ok: int
    good: int
    late: int
    latest_ms: float
    errors: Mapping[str, int]
    latency: Latency
    first: Latency
    histogram: str
    first_histogram: str


@dataclass(frozen=True, kw_only=True)
class Second:
    """One second after warm-up: the calls that ended in it."""

    second: int
    ok: int
    good: int
    failed: int
    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Accuracy of the load generator.

    Attributes:
        lag_p99_ms: 99th percentile of the delay between scheduled and actual start of a call.
        lag_max_ms: Maximum of that delay.
        busy_share: Fraction of one core used by the busiest process; close to 1 the generator was
            the bottleneck, and latencies include its own.
    """

    lag_p99_ms: float
    lag_max_ms: float
    busy_share: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of one plan.

    Attributes:
        plan: The plan, without the token.
        started_at: Start of the measurement, ISO 8601 in UTC.
        seconds_counted: Duration of the measurement in seconds.
        throughput_per_s: Successful responses per second.
        goodput_per_s: Successful responses before their deadline, per second.
        images_per_s: Images in successful responses, per second.
        total: Outcome of all kinds together.
        kinds: Outcome of each kind.
        series: Results of each second.
        generator: Accuracy of the load generator.
    """

    plan: Mapping[str, Any]
    started_at: str
    seconds_counted: float
    throughput_per_s: float
    goodput_per_s: float
    images_per_s: float
    total: Outcome
    kinds: Mapping[str, Outcome]
    series: Sequence[Second]
    generator: Generator

    def document(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return dataclasses.asdict(self)

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")


def summed(plan: Plan, documents: Sequence[dict[str, Any]], started_at: str) -> Report:
    """Return the report of a plan from the results of its processes."""
    kinds = {
        kind: _outcome([d["outcomes"][kind] for d in documents if kind in d["outcomes"]])
        for kind in sorted({kind for document in documents for kind in document["outcomes"]})
    }
    lag = _merged(document["lag"] for document in documents)
    length = plan.duration_s
    if plan.count is not None:  # The load may have ended earlier.
        length = min(length, max(max(document["last_end_s"] for document in documents), 1e-9))
    window: Counter[str] = Counter()
    for document in documents:
        window.update(document["in_window"])
    return Report(
        plan=plan.facts(),
        started_at=started_at,
        seconds_counted=length,
        throughput_per_s=window["ok"] / length,
        goodput_per_s=window["good"] / length,
        images_per_s=window["ok"] * plan.images / length,
        total=_total(list(kinds.values())),
        kinds=kinds,
        series=_series(documents),
        generator=Generator(
            lag_p99_ms=lag.get_value_at_percentile(99) / 1e3,
            lag_max_ms=lag.get_max_value() / 1e3,
            busy_share=max(document["busy_share"] for document in documents),
        ),
    )


def latencies_of(outcome: Outcome) -> Histogram:
    """Return the histogram of an outcome, in µs."""
    return _merged([outcome.histogram])


def _outcome(parts: Sequence[Mapping[str, Any]]) -> Outcome:
    codes: Counter[str] = Counter()
    for part in parts:
        codes.update(part["codes"])
    merged = _merged(part["latencies"] for part in parts)
    firsts = _merged(part["firsts"] for part in parts)
    return Outcome(
        calls=codes.total(),
        ok=codes["OK"],
        good=sum(part["good"] for part in parts),
        late=sum(part["late"] for part in parts),
        latest_ms=1e3 * max((part["latest_s"] for part in parts), default=0.0),
        errors={code: count for code, count in sorted(codes.items()) if code != "OK"},
        latency=_latency(merged),
        first=_latency(firsts),
        histogram=merged.encode().decode(),
        first_histogram=firsts.encode().decode(),
    )


def _total(outcomes: Sequence[Outcome]) -> Outcome:
    return _outcome(
        [
            {
                "codes": {**outcome.errors, "OK": outcome.ok},
                "good": outcome.good,
                "late": outcome.late,
                "latest_s": outcome.latest_ms / 1e3,
                "latencies": outcome.histogram,
                "firsts": outcome.first_histogram,
            }
            for outcome in outcomes
        ]
    )


def _series(documents: Sequence[dict[str, Any]]) -> tuple[Second, ...]:
    parts: dict[int, list[dict[str, Any]]] = {}
    for document in documents:
        for second, facts in document["seconds"]:
            parts.setdefault(second, []).append(facts)
    return tuple(_second(second, parts.get(second, [])) for second in range(max(parts) + 1))


def _second(second: int, parts: Sequence[Mapping[str, Any]]) -> Second:
    latency = _latency(_merged((part["latencies"] for part in parts), digits=2))
    return Second(
        second=second,
        ok=sum(part["ok"] for part in parts),
        good=sum(part["good"] for part in parts),
        failed=sum(part["failed"] for part in parts),
        p50_ms=latency.p50_ms,
        p99_ms=latency.p99_ms,
        max_ms=latency.max_ms,
    )


def _merged(encoded: Iterable[str], digits: int = 3) -> Histogram:
    merged = histogram(digits)
    for text in encoded:
        merged.decode_and_add(text)
    return merged


def _latency(latencies: Histogram) -> Latency:
    if not latencies.get_total_count():
        return Latency(**dict.fromkeys((*_PERCENTILES, "mean_ms", "max_ms"), 0.0))
    return Latency(
        mean_ms=latencies.get_mean_value() / 1e3,
        max_ms=latencies.get_max_value() / 1e3,
        **{
            name: latencies.get_value_at_percentile(percentile) / 1e3
            for name, percentile in _PERCENTILES.items()
        },
    )
