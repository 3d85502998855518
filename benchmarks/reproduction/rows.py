"""Rows of a record: comparisons by network, with figures, differences and conditions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reproduction.published import MACHINES, MEASURES, PAPER, STATEMENTS, Row
from els_service.experiments.comparison.agreement import mean_interval, median_interval

_PAIRS = tuple(dict.fromkeys((s.machine, s.over) for s in STATEMENTS if isinstance(s.over, str)))
_ONLY = "paper"
"""Protocol of records without protocols."""
_INTERVALS = {"explained": mean_interval, "pearson_r": median_interval}


def rows_of(
    comparisons: Sequence[tuple[str, dict[str, Any]]], trained: Sequence[Path] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the paper's rows with their comparisons, then comparisons without a row.

    Args:
        comparisons: data set and content of ``compare.json``; several of one network, with other
            machines, are one.
        trained: folders of model folders, in which the conditions of training are looked up.

    Raises:
        ValueError: Comparisons of a network have a machine twice, or a folder has other weights.
    """
    of_key: dict[tuple[str, str, str, bool], list[dict[str, Any]]] = {}
    for data, contents in _by_network(comparisons):
        network = contents[0]["network"]
        conditional = network["label_count"] > 0
        key = (data, network["architecture"], network["padding"], conditional)
        of_key.setdefault(key, []).append(_ours(contents, trained))
    for row in PAPER:
        yield _described(row, of_key.pop(row.key, []))
    for key, ours in of_key.items():
        yield _described(Row(*key), ours)


def with_earlier(
    rows: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]], source: str
) -> list[dict[str, Any]]:
    """Return rows with what an earlier record has of networks and protocols that they lack.

    Args:
        rows: of the new record.
        earlier: of the earlier one.
        source: its name, which is added to what is kept.
    """
    new = {
        (ours["network"], protocol)
        for row in rows
        for ours in row["ours"]
        for protocol in ours["protocols"] or (_ONLY,)
    }
    merged = {_key(row): row | {"ours": list(row["ours"])} for row in rows}
    for row in earlier:
        kept = [{"record": source} | one for ours in row["ours"] if (one := _without(ours, new))]
        if kept:
            merged.setdefault(_key(row), row | {"ours": []})["ours"] += kept
    return list(merged.values())


def _without(ours: dict[str, Any], new: set[tuple[str, str]]) -> dict[str, Any] | None:
    """Return a comparison without the protocols that are compared again; None if none is left."""
    name = ours["network"]
    if not ours.get("protocols"):
        return None if (name, _ONLY) in new else ours
    kept = {p: one for p, one in ours["protocols"].items() if (name, p) not in new}
    if not kept:
        return None
    return ours | {
        "protocols": kept,
        "differences": {p: one for p, one in ours["differences"].items() if p in kept},
        "at_network_steps": _merged(one["at_network_steps"] for one in kept.values()),
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("data", "architecture", "padding", "conditional"))


def _by_network(
    comparisons: Sequence[tuple[str, dict[str, Any]]],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield data set and comparisons of a network on the same images, in their order."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for data, content in comparisons:
        network, bank = content["network"], content["bank"]
        same = (network["name"], network["fingerprint"], bank["fingerprint"])
        how = tuple(content[name] for name in ("count", "seed", "indexing"))
        found.setdefault((data, *same, *how), []).append(content)
    yield from ((key[0], contents) for key, contents in found.items())


def _described(row: Row, ours: list[dict[str, Any]]) -> dict[str, Any]:
    paper = {name: getattr(row, name) for name in MACHINES}
    described = {name: value for name, value in vars(row).items() if name not in paper}
    return described | {"paper": None if row.els is None else paper, "ours": ours}


def _ours(contents: Sequence[dict[str, Any]], trained: Sequence[Path]) -> dict[str, Any]:
    first = contents[0]
    network, bank = first["network"], first["bank"]
    machines = [_at_steps(content["at_network_steps"]) for content in contents]
    protocols = [_protocols(content) for content in contents]
    windows: dict[str, str] = {}
    for content in contents:
        windows |= content.get("windows_by_machine", {})
    raw = _merged(protocols)
    return {
        "network": network["name"],
        "parameters": network["parameters"],
        "network_fingerprint": network["fingerprint"],
        "bank_images": bank["images"],
        "bank_fingerprint": bank["fingerprint"],
        "is_training_data": bank.get("is_training_data"),
        "windows": first["windows"],
        "windows_by_machine": windows,
        "indexing": first["indexing"],
        "machine_steps": first["machine_steps"],
        "count": first["count"],
        "seed": first["seed"],
        "commands": [content.get("command", "") for content in contents],
        "at_network_steps": _figures_at(_merged(machines)),
        "protocols": {
            name: one | {"at_network_steps": _figures_at(one["at_network_steps"])}
            for name, one in raw.items()
        },
        "differences": {
            name: {steps: _differences(found) for steps, found in one["at_network_steps"].items()}
            for name, one in raw.items()
        },
        **_conditions(network, trained),
    }


def _at_steps(results: dict[str, Any]) -> dict[str, Any]:
    return {steps: dict(machines) for steps, machines in results.items()}


def _protocols(content: dict[str, Any]) -> dict[str, Any]:
    """Return the results of each protocol, and the seconds a step of each machine."""
    found = {}
    for name, protocol in content.get("protocols", {}).items():
        steps, results = protocol["machine_steps"], protocol["at_network_steps"]
        ending = "" if steps == content["machine_steps"] else f"-{steps}"
        seconds = content["seconds_per_step"]
        found[name] = {
            "machine_steps": steps,
            "seconds_per_step": {m: seconds[m + ending] for m in next(iter(results.values()))},
            "at_network_steps": _at_steps(results),
        }
    return found


def _merged(parts: Iterable[dict[str, Any]], where: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return nested dicts as one.

    Raises:
        ValueError: Two have different values of one key, such as results of a machine.
    """
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key not in merged:
                merged[key] = value
            elif isinstance(value, dict) and "pearson_r" not in value:
                merged[key] = _merged([merged[key], value], (*where, key))
            elif merged[key] != value:
                place = ", ".join((*where, key))
                raise ValueError(f"comparisons of a network: expected each once, got two: {place}")
    return merged


def _figures_at(results: dict[str, Any]) -> dict[str, Any]:
    """Return medians and means with their intervals, by steps and machine."""
    return {
        steps: {name: _figures(one) for name, one in machines.items()}
        for steps, machines in results.items()
    }


def _figures(one: dict[str, Any]) -> dict[str, Any]:
    figures = {name: one[name] for name in MEASURES}
    figures |= {name: one[name] for name in map(interval_of, MEASURES)}
    return figures | {k: one[k] for k in ("share_above_ideal",) if k in one}


def interval_of(measure: str) -> str:
    """Return the name of the interval of a measure in a comparison."""
    return f"{measure.removeprefix('median_')}_interval"


def _differences(machines: dict[str, Any]) -> dict[str, Any]:
    """Return differences of two machines on the same images, with 95 % bootstrap intervals.

    The mean of differences in explained variance, and the median of those in Pearson r.
    """
    return {
        f"{one} - {other}": {
            measure: interval(np.subtract(machines[one][measure], machines[other][measure]))
            for measure, interval in _INTERVALS.items()
        }
        for one, other in _PAIRS
        if one in machines and other in machines
    }


def _conditions(network: dict[str, Any], trained: Sequence[Path]) -> dict[str, Any]:
    """Return records of the training of a network, and of calibrations to it, if there are some."""
    found: dict[str, Any] = {"training": None, "calibrations": []}
    others = []
    for root in trained:
        folder = root / network["name"]
        if found["training"] is None and (folder / "training.json").exists():
            digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
            if digest == network["fingerprint"]:
                found["training"] = json.loads((folder / "training.json").read_bytes())
            else:
                others.append(f"{folder} with weights {digest}")
        for path in sorted(root.glob("*/calibration.json")):
            content = json.loads(path.read_bytes())
            if content.get("network", {}).get("fingerprint") == network["fingerprint"]:
                wanted = ("machine", "command", "samples", "steps", "seed", "draws", "eta")
                kept = {name: content[name] for name in wanted if name in content}
                kept["bank_images"] = content["bank"]["images"]
                found["calibrations"].append({"folder": path.parent.name, **kept})
    if found["training"] is None and others:
        expected = f"weights {network['fingerprint']} of the compared network"
        raise ValueError(f"trained: expected {expected}, got {', '.join(others)}")
    return found
