"""Cost of a report: of a sample with one beside the same sample without."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.gallery import DEMO, DEMO_FILE
from benchmarks.originality.served import full_models, served
from benchmarks.originality.singles import write_model
from benchmarks.service.statistics import ratio_of_pairs
from els_client import Client
from els_kernels import MAX_SOURCES
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.originality import report
from els_service.denoisers.samplers import options_for, sample
from els_service.engine.derived import DISTANCE_S, REPORT_S
from els_service.repository import ModelRepository, bundled_models
from els_service.server.requests.originality import report_query

BUDGET = 0.20
"""Largest share of the time of drawing that a report may take."""
_BUNDLED = ("fashion-els", "fashion-local", "fashion-ideal")
_FULL = ("fashion-full-els", "mnist-full-els")
_STEPS, _REPEATS = 5, 5


def rows(
    full: Sequence[Path] | None, names: Sequence[str] | None, rounds: int, side: int
) -> Iterator[dict[str, Any]]:
    """Yield the cost of a report of each model, of a picture, and the scheduler's constants."""
    with full_models(full) as root, served(root) as client:
        for name in names or (_BUNDLED if root is None else _FULL):
            yield _row(client, name, rounds, {"model": name})
    with tempfile.TemporaryDirectory() as folder:
        with Image.open(DEMO_FILE) as photo:
            photo.thumbnail((side, side))
            write_model(Path(folder), DEMO.name, photo)
        with served(Path(folder)) as client:
            given = {"model": DEMO.name, "sampler": "pyramid"}
            yield _row(client, f"picture {DEMO_FILE.name}", rounds, given)
    yield _constants()


def _row(client: Client, name: str, rounds: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of samples without and with a report, in turn, and the median share."""
    labels = client.model(given["model"]).label_count if "sampler" not in given else 0
    took: dict[bool, list[float]] = {False: [], True: []}
    _drawn(client, {**given, "seed": 0}, originality=True)
    for number in range(rounds):
        options = {**given, "seed": number, "label": number % labels if labels else None}
        # The first of a pair in turn: neither has the warmer caches.
        for with_report in (False, True) if number % 2 else (True, False):
            took[with_report].append(_drawn(client, options, originality=with_report))
    ratio, low, high = ratio_of_pairs(took[True], took[False])
    return {
        "model": name,
        "rounds": rounds,
        "draw_s": round(float(np.median(took[False])), 4),
        "with_report_s": round(float(np.median(took[True])), 4),
        "report_share": round(ratio - 1, 4),
        "interval": [round(low - 1, 4), round(high - 1, 4)],
        "within_budget": ratio - 1 <= BUDGET,
        "raw": {str(key): [round(one, 4) for one in value] for key, value in took.items()},
    }


def _drawn(client: Client, options: dict[str, Any], *, originality: bool) -> float:
    """Return the seconds of one sample."""
    began = time.perf_counter()
    *_, last = client.sample(**options, count=1, want=(), originality=originality)
    if originality:
        assert len(last.originality) == 1
    return time.perf_counter() - began


def _constants() -> dict[str, Any]:
    """Return the seconds a number of the bank of distances, and of the measures of sources.

    They are those of this thread, which other work beside does not lengthen.
    """
    model = ModelRepository(bundled_models()).load(_BUNDLED[0])
    assert isinstance(model, AnalyticDenoiser)
    bank = model.bank
    options = options_for(model.info, steps=_STEPS)
    *_, last = sample(model, options=options, labels=[0])
    query = report_query(last.x.float().numpy(), np.array([0]), model.info)
    found = model.explain(query, MAX_SOURCES)
    sources = found.sources[0], found.weights[0], found.shares[0]
    alone, every = [], []
    for _ in range(_REPEATS):
        began = time.thread_time()
        report(query.pixels[0], bank)
        between = time.thread_time()
        report(query.pixels[0], bank, *sources)
        alone.append(between - began)
        every.append(time.thread_time() - between)
    return {
        "model": "constants of the scheduler",
        "bank_numbers": bank.size,
        "distance_s": float(f"{min(alone) / bank.size:.3g}"),
        "assumed_distance_s": DISTANCE_S,
        "report_s": float(f"{max(0.0, min(every) - min(alone)):.3g}"),
        "assumed_report_s": REPORT_S,
    }
