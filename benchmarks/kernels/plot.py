"""Plots of a record: speed against the window, error against the noise level."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
Series = dict[str, list[tuple[float, float]]]
"""Name → points (x, y)."""

COLOURS = {"native": "C0", "triton": "C0", "torch": "C1", "sdpa": "C2", "pykeops": "C3"}
COLOURS |= {"unfold": "C1", "flex_attention": "C4", "exp2 bound": "0.5"}


def draw(record: Path) -> Iterator[Path]:
    """Plot a record and yield the PNG files, in its folder."""
    content = json.loads(record.read_text())
    panels = speeds(content)
    if panels:
        yield _save(record, "speed", [(_speed, title, series) for title, series in panels.items()])
    errors = [row for row in content.get("rows", []) if row.get("part") == "errors"]
    if errors:
        yield _save(record, "errors", list(_error_panels(errors)))


def speeds(content: dict[str, Any]) -> dict[str, Series]:
    """Return pairs per second against k for every bank with peers, of either kind of record."""
    panels: dict[str, Series] = defaultdict(lambda: defaultdict(list))
    for row in content.get("rows", []):
        if row.get("part") in ("native", "peers"):
            panel = panels[_title((row["channels"], row["side"], row["side"]), row["images"])]
        elif row.get("name") == "window":
            panel = panels[_title(row["shape"], row["images"])]
        else:
            continue
        for name, rate in _rates(row):
            panel[name].append((row.get("k", row.get("window")), rate))
    own = {"native", "triton", "native, boundary-broken", "triton, boundary-broken"}
    panels = {title: panel for title, panel in panels.items() if not own.issuperset(panel)}
    for panel in panels.values():
        if bound := content.get("exp2_bound"):
            windows = [k for points in panel.values() for k, _ in points]
            panel["exp2 bound"] = [(min(windows), bound), (max(windows), bound)]
    return panels


def _rates(row: Row) -> Iterator[tuple[str, float]]:
    """Yield contender and pairs per second of one row."""
    if row.get("part") == "native":
        circular = row["padding"] == "circular"
        yield "native" if circular else "native, boundary-broken", row["gpairs"] * 1e9
    elif row.get("part") == "peers":
        for name in ("torch", "sdpa", "pykeops"):
            if name in row:
                yield name, row[name]["gpairs"] * 1e9
    else:
        circular = row["machine"][1] == "circular"
        yield "triton" if circular else "triton, boundary-broken", row["pairs_per_s"]
        for name, peer in row.get("peers", {}).items():
            if "failed" not in peer:
                yield name, peer["pairs_per_s"]


def _title(shape: tuple[int, ...], images: int) -> str:
    channels, height, width = shape
    return f"{height}×{width}{f'×{channels}' if channels > 1 else ''}, {images:,} images"


def _error_panels(errors: list[Row]) -> Iterator[tuple[Any, str, Series]]:
    """Yield plot function, title, and the worst error of all shapes and windows at each t."""
    for what, label in (
        ("mean", "mean, ‖error‖ / ‖float64‖"),
        ("evidence", "log evidence, |error| / budget"),
    ):
        worst: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
        for row in errors:
            error, budget = row[f"{what}_error"], row[f"{what}_budget"]
            # The evidence's budget follows the size of the logits: error in units of it.
            value = error if what == "mean" else error / budget
            points = worst[row["implementation"]]
            points[row["t"]] = max(points[row["t"]], value)
        series = {name: sorted(points.items()) for name, points in worst.items()}
        times = sorted({row["t"] for row in errors})
        limit = errors[0]["mean_budget"] if what == "mean" else 1.0
        first = 0.05 if what == "mean" else times[0]
        series["budget"] = [(first, limit), (times[-1], limit)]
        yield _error, label, series


def _speed(axes: Axes, series: Series) -> None:
    for name, points in series.items():
        ks, rates = zip(*sorted(points), strict=True)
        colour = COLOURS[name.partition(",")[0]]
        variant = "," in name or name == "exp2 bound"
        axes.plot(ks, rates, "--" if variant else "o-", color=colour, label=name)
    axes.set(yscale="log", xlabel="window k", ylabel="pairs per second")
    axes.set_xticks(sorted({k for points in series.values() for k, _ in points}))


def _error(axes: Axes, series: Series) -> None:
    for name, points in series.items():
        ts, errors = zip(*points, strict=True)
        budget = name == "budget"
        axes.plot(ts, errors, "k--" if budget else "o-", label=name, lw=1 if budget else 1.5, ms=4)
    axes.set(yscale="log", xscale="log", xlabel="noise level t (cosine schedule)")


def _save(record: Path, what: str, panels: list[tuple[Any, str, Series]]) -> Path:
    figure = Figure(figsize=(4.6 * len(panels), 4), layout="constrained")
    for i, (paint, title, series) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        paint(axes, series)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    names: dict[str, Any] = {}
    for axes in figure.axes:
        lines, labels = axes.get_legend_handles_labels()
        names |= dict(zip(labels, lines, strict=True))
    figure.legend(
        list(names.values()), list(names), loc="outside upper center", ncols=6, fontsize=8
    )
    path = record.with_name(f"{record.stem.removesuffix(f'-{what}')}-{what}.png")
    figure.savefig(path, dpi=110)
    return path
