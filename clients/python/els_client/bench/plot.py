"""Plots: of a report over time, with the tail of its latencies; of a sweep by request rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from els_client.bench.report import Outcome, Report, latencies_of
from els_client.bench.sweep import Sweep, served_per_s
from els_client.errors import InvalidArgumentError


def check_suffix(path: Path) -> None:
    """Check that a plot can be written to a file of that name.

    Raises:
        InvalidArgumentError: The suffix is of no format that matplotlib writes.
    """
    if path.suffix.lower().removeprefix(".") not in Figure().canvas.get_supported_filetypes():
        text = f"{path}: expected a name of a picture, such as load.png, .svg or .pdf"
        raise InvalidArgumentError(text)


def draw(reports: Sequence[Report], path: Path) -> None:
    """Write a plot (PNG, SVG or PDF by the suffix) of several loads over time."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    over_time, rates, tail = figure.subplots(1, 3)
    for report in reports:
        _draw_latency(over_time, report)
        _draw_rates(rates, report)
        for kind, outcome in report.kinds.items():
            _draw_tail(tail, f"{report.plan['name']}: {kind}", outcome)
    for axes, title, x, y in (
        (over_time, "latency", "second", "ms"),
        (rates, "calls ended", "second", "calls per second"),
        (tail, "latency tail", "ms", "share of answers"),
    ):
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_sweep(sweep: Sweep, path: Path) -> None:
    """Write a plot (PNG, SVG or PDF by the suffix) of a sweep by request rate."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    latency, rates, admission = figure.subplots(1, 3)
    offered = [point.plan["rate_per_s"] for point in sweep.points]
    waits = [sweep.admission_ms(point) for point in sweep.points]
    for number, (name, style) in enumerate((("p50", "o-"), ("p99", "o--"))):
        values = [getattr(point.total.latency, f"{name}_ms") for point in sweep.points]
        latency.plot(offered, values, style, label=name)
        admission.plot(offered, [wait[number] for wait in waits], style, label=name)
    alone = sweep.serial.total.latency.p50_ms
    latency.axhline(alone, color="grey", linestyle=":", label="one caller, p50")
    throughputs = [served_per_s(point) for point in sweep.points]
    rates.plot(offered, throughputs, "o-", label="successful")
    rates.plot(offered, offered, color="grey", linestyle=":", label="offered")
    serial = served_per_s(sweep.serial)
    rates.axhline(serial, color="tab:orange", linestyle="-.", label="one caller")
    rates.axhline(sweep.ceiling_per_s, color="tab:red", linestyle="--", label="ceiling")
    latency.set_yscale("log")
    for axes, title, y in (
        (latency, "latency from scheduled start", "ms"),
        (rates, "responses", "calls per second"),
        (admission, "wait for admission", "ms"),
    ):
        axes.set(title=title, xlabel="offered calls per second", ylabel=y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _draw_latency(axes: Axes, report: Report) -> None:
    answered = [second for second in report.series if second.ok]
    for name, style in (("p50_ms", "-"), ("p99_ms", "--")):
        values = [getattr(second, name) for second in answered]
        label = _label(report, name.removesuffix("_ms"))
        axes.plot([second.second for second in answered], values, style, label=label)
    axes.set_yscale("log")


def _draw_rates(axes: Axes, report: Report) -> None:
    # Without the last second, which only has late responses.
    whole = [second for second in report.series if second.second < report.seconds_counted]
    for name, style in (("good", "-"), ("failed", ":")):
        values = [getattr(second, name) for second in whole]
        axes.plot([second.second for second in whole], values, style, label=_label(report, name))


def _label(report: Report, name: str) -> str:
    return f"{report.plan['name']}: {name}"


def _draw_tail(axes: Axes, label: str, outcome: Outcome) -> None:
    if not outcome.ok:
        return
    recorded = latencies_of(outcome).get_recorded_iterator()
    ms, counts = zip(
        *((item.value_iterated_to / 1e3, item.count_at_value_iterated_to) for item in recorded),
        strict=True,
    )
    longer = 1 - np.cumsum(counts) / outcome.ok
    axes.step(ms, np.maximum(longer, 0.5 / outcome.ok), where="post", label=label)
    axes.set(xscale="log", yscale="log")
