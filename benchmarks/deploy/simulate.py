"""Autoscaling of 1 to 1,000 replicas under a tenfold load step: reaction time, queues, price.

    python -m benchmarks.deploy.simulate [--service-times FILE] [--model fashion-els]
                                         [--price-per-core-hour 0.04] [--start-seconds 30]

``scaler.py`` describes the simulation. Service times are those measured by
``benchmarks.deploy.scale``. Three scalers: by queued work and the busy share of replicas, with the
parameters of ``deploy/components/keda``; and by queued work only, with the same and with twice the
polling interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from deploy.rendered import DEPLOY

from benchmarks import record
from benchmarks.deploy.scaler import Trace, World, simulate

REPLICAS = (1, 3, 10, 30, 100, 300, 1000)
MANIFEST = DEPLOY / "components" / "keda" / "scaledobject.yaml"
_SHOWN = 10
"""Initial replicas of the run that is plotted over time."""


def scalers() -> dict[str, dict[str, Any]]:
    """Return the parameters of each scaler; the last is that of the manifest."""
    spec = yaml.safe_load(MANIFEST.read_text())["spec"]
    targets = {one["name"]: float(one["metadata"]["threshold"]) for one in spec["triggers"]}
    poll_s = float(spec["pollingInterval"])
    queue = {"poll_s": poll_s, "queue_target_s": targets["queue-cost"]}
    return {
        f"queue, {poll_s:g} s": queue,
        f"queue, {2 * poll_s:g} s": {**queue, "poll_s": 2 * poll_s},
        f"queue or busy, {poll_s:g} s": {**queue, "busy_target": targets["busy-share"]},
    }


def row(scaler: str, world: World, trace: Trace, price_per_core_hour: float) -> dict[str, Any]:
    """Return the row of a simulation; times are counted from the step."""
    at_s, waiting_s = np.array(trace.at_s), np.array(trace.waiting_s)
    wanted = np.array(trace.wanted)
    during = (at_s >= world.step_at_s) & (at_s < world.back_at_s)
    grown = at_s[during & (wanted > wanted[at_s < world.step_at_s].max())]
    deep = at_s[during & (waiting_s > world.queue_target_s)]
    price = price_per_core_hour * trace.paid_s / 3600
    return {
        "scaler": scaler,
        "replicas_at_first": world.replicas,
        "replicas_at_most": int(wanted.max()),
        "reacts_after_s": round(float(grown[0]) - world.step_at_s, 1) if len(grown) else None,
        "deepest_s": round(float(waiting_s.max()), 2),
        "deepest_calls_a_replica": round(float(waiting_s.max() / np.mean(world.service_s))),
        "last_above_target_s": round(float(deep[-1]) - world.step_at_s, 1) if len(deep) else 0.0,
        "refused_share": round(trace.refused / (trace.refused + trace.answered), 4),
        "resizes_after_the_step": int(np.count_nonzero(np.diff(wanted[during]))),
        "busy_share": round(trace.answered * float(np.mean(world.service_s)) / trace.paid_s, 3),
        "price_per_million": round(1e6 * price / trace.answered, 3),
    }


def service_times_s(path: Path, model: str) -> list[float]:
    """Return the measured core seconds of a model.

    Raises:
        ValueError: The record has none.
    """
    for found in json.loads(path.read_text())["rows"]:
        if found.get("part") == "service time" and found["model"] == model:
            return [ms / 1e3 for ms in found["quantiles_core_ms"]]
    raise ValueError(f"{path}: expected service times of {model}, found none")


def plot(shown: dict[str, Trace], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot replicas and queues over time, and the results by number of replicas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    (replicas, queue), (again, price) = figure.subplots(2, 2)
    for name, trace in shown.items():
        replicas.plot(trace.at_s, trace.serving, label=name)
        queue.plot(trace.at_s, trace.waiting_s, label=name)
        mine = [one for one in rows if one["scaler"] == name]
        sizes = [one["replicas_at_first"] for one in mine]
        again.semilogx(sizes, [one["last_above_target_s"] for one in mine], "o-", label=name)
        price.semilogx(sizes, [one["price_per_million"] for one in mine], "o-", label=name)
    titles = {
        replicas: (f"serving replicas, initially {_SHOWN}", "s", ""),
        queue: ("queued work of a replica", "s", "s"),
        again: ("time from the step until the load is served", "initial replicas", "s"),
        price: ("price of a million denoisings", "initial replicas", ""),
    }
    for axes, (title, x, y) in titles.items():
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    replicas.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Simulate, print, write the record and the figure beside it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    newest = max(record.RESULTS.glob("*-deploy-scale.json"), default=None)
    parser.add_argument("--service-times", type=Path, default=newest, required=newest is None)
    parser.add_argument("--model", default="fashion-els", help="model of the service times")
    parser.add_argument("--price-per-core-hour", type=float, default=0.04, help="any currency")
    parser.add_argument("--start-seconds", type=float, default=30.0, help="request to service")
    parser.add_argument("--replicas", type=int, nargs="*", default=REPLICAS, help="at first")
    record.add_arguments(parser)
    options = parser.parse_args()
    recorder = record.start("deploy-simulation", options)
    times = service_times_s(options.service_times, options.model)
    world = World(service_s=times, start_s=options.start_seconds)
    rows, shown = [], {}
    settings_of = scalers()
    for name, settings in settings_of.items():
        for count in options.replicas:
            each = replace(world, replicas=count, **settings)
            trace = simulate(each)
            rows.append(row(name, each, trace, options.price_per_core_hour))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            if count == _SHOWN:
                shown[name] = trace
    facts = {
        "model": options.model,
        "service_times": options.service_times.name,
        "price_per_core_hour": options.price_per_core_hour,
        "start_s": options.start_seconds,
        "load": world.load,
        "step": world.step,
        **next(reversed(settings_of.values())),
    }
    path = recorder.write([facts, *rows])
    plot(shown, rows, path.with_suffix(".png"))
    print(f"record: {path}")


if __name__ == "__main__":
    main()
