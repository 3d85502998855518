"""Results of one process: outcomes and latencies, in total and for each second."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, TypeAlias

# hdrhistogram ships no types.
Histogram: TypeAlias = Any

_LONGEST_US = 3_600_000_000


def histogram(digits: int = 3) -> Histogram:
    """Return an empty histogram of 1 µs to 1 h, exact to ``digits`` significant digits."""
    # Local import: the command line imports this module without the extra.
    from hdrh.histogram import HdrHistogram

    return HdrHistogram(1, _LONGEST_US, digits)


def add_seconds(target: Histogram, seconds: float) -> None:
    """Count one duration; values out of range count at its limit."""
    target.record_value(min(max(round(seconds * 1e6), 1), _LONGEST_US))


@dataclass
class Outcome:
    """Outcome of the calls of one kind; latencies are those of successful calls."""

    codes: Counter[str] = field(default_factory=Counter)
    good: int = 0
    late: int = 0
    latest_s: float = 0.0
    latencies: Histogram = field(default_factory=histogram)
    firsts: Histogram = field(default_factory=histogram)
    """Times until the first message: of a sample its first step, else the response."""


@dataclass
class Second:
    """One second of the load, by the end of its calls."""

    ok: int = 0
    good: int = 0
    failed: int = 0
    latencies: Histogram = field(default_factory=lambda: histogram(2))


class Tally:
    """Counts calls as they end.

    Args:
        start: Start of the measurement, in seconds of ``time.monotonic``.
        stop: End of the measurement, when no more calls are started.
        deadline_s: Deadline for a good response.
    """

    def __init__(self, *, start: float, stop: float, deadline_s: float | None) -> None:
        self.start, self.stop = start, stop
        self._deadline_s = math.inf if deadline_s is None else deadline_s
        self.outcomes: defaultdict[str, Outcome] = defaultdict(Outcome)
        self.lag = histogram()
        self.in_window: Counter[str] = Counter()
        self.last_end = start
        self._seconds: dict[int, dict[str, Any]] = {}
        self._second = Second()
        self._now = 0

    def add(
        self,
        kind: str,
        *,
        intended: float,
        sent: float,
        end: float,
        code: str,
        first: float | None = None,
    ) -> None:
        """Count a call scheduled at ``intended``, started at ``sent``, ended at ``end``.

        Its first message arrived at ``first``; None means at its end.
        """
        latency = end - intended
        late = latency > self._deadline_s
        if end >= self.start:
            self._add_to_second(end, latency, code == "OK", late)
        if intended < self.start:
            return  # Part of the warm-up.
        outcome = self.outcomes[kind]
        outcome.codes[code] += 1
        self.last_end = max(self.last_end, end)
        add_seconds(self.lag, sent - intended)
        if code != "OK":
            return
        add_seconds(outcome.latencies, latency)
        add_seconds(outcome.firsts, (end if first is None else first) - intended)
        outcome.good += not late
        if late:
            outcome.late += 1
            outcome.latest_s = max(outcome.latest_s, latency - self._deadline_s)

    def add_unanswered(self, kind: str, code: str, intended: float) -> None:
        """Count a call without a response."""
        if intended >= self.start:
            self.outcomes[kind].codes[code] += 1

    def _add_to_second(self, end: float, latency: float, ok: bool, late: bool) -> None:
        if (now := int(end - self.start)) != self._now:
            self._close_second()
            self._now = now
        second = self._second
        second.ok += ok
        second.good += ok and not late
        second.failed += not ok
        if end < self.stop:
            self.in_window.update(ok=ok, good=ok and not late)
        if ok:
            add_seconds(second.latencies, latency)

    def _close_second(self) -> None:
        """Encode the histogram of a past second, which saves memory."""
        self._seconds[self._now] = _second_document(self._second)
        self._second = Second()

    def document(self) -> dict[str, Any]:
        """Return the results as JSON."""
        self._close_second()
        outcomes = {
            kind: {
                "codes": dict(outcome.codes),
                "good": outcome.good,
                "late": outcome.late,
                "latest_s": outcome.latest_s,
                "latencies": outcome.latencies.encode().decode(),
                "firsts": outcome.firsts.encode().decode(),
            }
            for kind, outcome in self.outcomes.items()
        }
        return {
            "outcomes": outcomes,
            "seconds": [[second, facts] for second, facts in self._seconds.items()],
            "in_window": dict(self.in_window),
            "lag": self.lag.encode().decode(),
            "last_end_s": self.last_end - self.start,
        }


def _second_document(second: Second) -> dict[str, Any]:
    return {
        "ok": second.ok,
        "good": second.good,
        "failed": second.failed,
        "latencies": second.latencies.encode().decode(),
    }
