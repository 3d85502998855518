"""Verdicts about published statements, from the numbers of a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reproduction.published import STATEMENTS, STEPS, Statement
from benchmarks.reproduction.rows import interval_of

VERDICTS = HOLDS, FAILS, OPEN = "holds", "does not hold", "open"
_ROUNDING = 0.005
"""Of figures with two digits."""


@dataclass(frozen=True)
class Verdict:
    """A statement, where it was examined, our numbers, and whether it holds."""

    statement: str
    source: str
    network: str
    numbers: str
    verdict: str


def figures_of(ours: dict[str, Any], protocol: str, steps: str) -> dict[str, Any]:
    """Return the figures of all machines in a protocol; none if it was not run."""
    protocols: dict[str, Any] = ours.get("protocols", {})
    if protocol in protocols:
        found: dict[str, Any] = protocols[protocol]["at_network_steps"].get(steps, {})
    else:
        # Comparisons without protocols have the paper's steps.
        found = ours["at_network_steps"].get(steps, {}) if protocol == "paper" else {}
    return found


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Return the verdicts of all statements about all networks of a record."""
    found = [
        verdict
        for statement in STATEMENTS
        for row in rows
        for ours in row["ours"]
        for verdict in _examined(statement, row, ours)
    ]
    return [*_values(rows), *found, *_attention(rows)]


def interval_verdict(low: float, high: float) -> str:
    """Return whether a number that should be above 0 is, by its interval."""
    return HOLDS if low > 0 else FAILS if high < 0 else OPEN


def _examined(statement: Statement, row: dict[str, Any], ours: dict[str, Any]) -> Iterator[Verdict]:
    machines = figures_of(ours, statement.protocol, statement.steps)
    one, over = machines.get(statement.machine), statement.over
    other = machines.get(over) if isinstance(over, str) else None
    if one is None or (isinstance(over, str) and other is None):
        return
    numbers = _shown(one, statement.measure)
    if other is None:
        low, high = (end - float(over) for end in one[interval_of(statement.measure)])
    else:
        numbers += f" against {_shown(other, statement.measure)}"
        kind = "explained" if statement.measure == "mean_explained" else "pearson_r"
        pair = (
            ours.get("differences", {})
            .get(statement.protocol, {})
            .get(statement.steps, {})
            .get(f"{statement.machine} - {over}")
        )
        if pair is None:
            low, high = _apart(one, other, statement.measure)
        else:
            middle, low, high = pair[kind]
            numbers += f"; difference {middle:+.3f} [{low:+.3f}, {high:+.3f}]"
    if row["data"] not in statement.data:
        numbers += f", on {row['data']}"
    verdict = interval_verdict(low, high)
    yield Verdict(statement.text, statement.source, ours["network"], numbers, verdict)


def _apart(one: dict[str, Any], other: dict[str, Any], measure: str) -> tuple[float, float]:
    """Return bounds of a difference: whether two intervals overlap."""
    (low, high), (other_low, other_high) = one[interval_of(measure)], other[interval_of(measure)]
    return low - other_high, high - other_low


def _values(rows: Sequence[dict[str, Any]]) -> Iterator[Verdict]:
    """Yield whether the paper's medians of ELS are reached, to their two digits."""
    for row in rows:
        for ours in row["ours"] if row["paper"] else []:
            for steps, published in zip(STEPS, row["paper"]["els"], strict=True):
                if (one := figures_of(ours, "paper", steps).get("els")) is None:
                    continue
                low, high = (end - published + _ROUNDING for end in one["pearson_r_interval"])
                text = (
                    f"ELS has a median r of {published:.2f} on {row['data']} {row['architecture']}"
                )
                by = one["median_pearson_r"] - published
                numbers = f"{_shown(one, 'median_pearson_r')}, {by:+.3f}"
                yield Verdict(
                    f"{text} {row['padding']}, {steps} steps",
                    "Kamb & Ganguli 2025",
                    ours["network"],
                    numbers,
                    interval_verdict(low, high),
                )


def _attention(rows: Sequence[dict[str, Any]]) -> Iterator[Verdict]:
    """Yield whether ELS predicts a network with attention less well than its pair without."""
    every = {
        ours["network"]: ours
        for row in rows
        for ours in row["ours"]
        if any(figures_of(ours, "paper", steps) for steps in STEPS)
    }
    for name, ours in every.items():
        pair = every.get(name.replace("-attention", ""))
        if pair is None or pair is ours:
            continue
        for steps in STEPS:
            without, given = (figures_of(o, "paper", steps).get("els") for o in (pair, ours))
            if without is None or given is None:
                continue
            low, high = _apart(without, given, "median_pearson_r")
            shown = [_shown(one, "median_pearson_r") for one in (given, without)]
            yield Verdict(
                f"ELS predicts a network with attention less well, {steps} steps",
                "Kamb & Ganguli 2025",
                name,
                f"{shown[0]} against {shown[1]} of `{pair['network']}`",
                interval_verdict(low, high),
            )


def _shown(one: dict[str, Any], measure: str) -> str:
    low, high = one[interval_of(measure)]
    return f"{one[measure]:.3f} [{low:.3f}, {high:.3f}]"
