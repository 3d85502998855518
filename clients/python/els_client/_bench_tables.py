"""Tables of the command ``els bench``."""

from __future__ import annotations

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from els_client.bench import Outcome, Report, Sweep
from els_client.bench.sweep import served_per_s


def show(report: Report) -> None:
    """Print counts, latencies and rates of a load."""
    names = ("calls", "ok", "good", "late", "p50", "p90", "p99", "p99.9", "max")
    columns = (Column(name, justify="right", no_wrap=True) for name in names)
    kind_column = Column(no_wrap=True)
    table = Table(kind_column, *columns, box=SIMPLE_HEAD, caption="latencies in ms")
    rows = dict(report.kinds) if len(report.kinds) == 1 else {**report.kinds, "all": report.total}
    for kind, outcome in rows.items():
        table.add_row(kind, *_cells(outcome))
    Console().print(table)
    typer.echo(
        f"{report.throughput_per_s:.1f} answers/s, {report.goodput_per_s:.1f} of them good,"
        f" {report.images_per_s:.1f} images/s over {report.seconds_counted:.1f} s"
    )
    if report.total.errors:
        errors = ", ".join(f"{code} {count}" for code, count in report.total.errors.items())
        typer.echo(f"failed: {errors}")
    generator = report.generator
    typer.echo(
        f"the load: calls started up to {generator.lag_p99_ms:.1f} ms late (p99),"
        f" busiest process used {generator.busy_share:.2f} of a core"
    )


def _cells(outcome: Outcome) -> list[str]:
    latency = outcome.latency
    counts = (outcome.calls, outcome.ok, outcome.good, outcome.late)
    times = (latency.p50_ms, latency.p90_ms, latency.p99_ms, latency.p999_ms, latency.max_ms)
    return [*map(str, counts), *(f"{value:.1f}" for value in times)]


def show_sweep(sweep: Sweep) -> None:
    """Print latencies and waits by rate, ceiling and gain of a sweep."""
    names = ("rate/s", "ok/s", "failed", "p50", "p99", "wait p50", "wait p99", "load")
    columns = (Column(name, justify="right", no_wrap=True) for name in names)
    caption = "ms, from the scheduled start of a call; wait: for admission"
    table = Table(*columns, box=SIMPLE_HEAD, caption=caption)
    for point in sweep.points:
        latency, waits = point.total.latency, sweep.admission_ms(point)
        table.add_row(
            f"{point.plan['rate_per_s']:.3g}",
            f"{served_per_s(point):.3g}",
            str(point.total.calls - point.total.ok),
            *(f"{ms:.1f}" for ms in (latency.p50_ms, latency.p99_ms, *waits)),
            "kept up" if sweep.generator_kept_up(point) else "too slow",
        )
    Console().print(table)
    typer.echo(
        f"ceiling: {sweep.ceiling_per_s:.3g} requests/s;"
        f" one caller: {served_per_s(sweep.serial):.3g}; gain: {sweep.gain:.2f} times"
    )
    alone, latency = sweep.serial.total.first, sweep.serial.total.latency
    typer.echo(
        f"one caller: p50 {latency.p50_ms:.1f} ms, first message after {alone.p50_ms:.1f} ms;"
        " admission is the time to the first message less this"
    )
