"""Compares results with the paper's table, row by row, and lists the rows not yet run.

    python -m benchmarks.reproduction FMNIST=DIR/compare.json MNIST=DIR/compare.json …
        [--note TEXT …] [--out FILE.json]

A comparison is the output of ``els-server compare``, preferably with ``--protocols
paper,ten-steps``, whose measures stand in a second table; its row is found by data, architecture,
padding and labels. Writes a dated record and the tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record

MACHINES = {"els": "ELS", "local": "LS", "ideal": "IS"}
STEPS = ("150", "20")
DATA = ("MNIST", "CIFAR10", "FMNIST", "CelebA")


PARAMETERS = {"resnet": 3_900_000, "unet": 1_900_000, "unet-attention": 1_900_000}
"""Minimum parameters of a network of the paper's size, which has 4.0 or 2.0 million."""
NOT_RUN = (
    "Not yet run",
    "Not yet run, for want of a GPU",
    "Not yet run at the paper's size, for want of a GPU",
    "Not run, as the data set of faces is not available",
)


MEASURES = ("median_pearson_r", "mean_pearson_r", "median_explained", "mean_explained", "mean_mse")
PUBLISHED = {
    "CIFAR10": {
        "ideal": (-0.401, 0.030),
        "wiener": (0.553, 0.008),
        "els": (0.411, 0.011),
        "pca": (0.670, 0.008),
    }
}
"""Mean explained variance and MSE, from the comparison of GoldDiff: 128 images, 10 DDIM steps,
against a UNet without attention, machines without calibrated windows."""


@dataclass(frozen=True)
class Row:
    """A row: median Pearson r of each machine, network at 150 and at 20 steps."""

    data: str
    architecture: str
    padding: str
    conditional: bool
    els: tuple[float, float] | None = None
    local: tuple[float, float] | None = None
    ideal: tuple[float, float] | None = None

    @property
    def key(self) -> tuple[str, str, str, bool]:
        """Fields that identify the row of a comparison."""
        return self.data, self.architecture, self.padding, self.conditional


PAPER = (
    Row("MNIST", "unet", "zeros", False, (0.89, 0.84), (0.88, 0.83), (0.70, 0.69)),
    Row("CIFAR10", "unet", "zeros", True, (0.90, 0.82), (0.87, 0.80), (0.41, 0.39)),
    Row("FMNIST", "unet", "zeros", True, (0.93, 0.91), (0.93, 0.91), (0.80, 0.80)),
    Row("CelebA", "unet", "zeros", False, (0.85, 0.75), (0.90, 0.81), (0.55, 0.51)),
    Row("MNIST", "resnet", "zeros", False, (0.94, 0.94), (0.82, 0.84), (0.61, 0.62)),
    Row("MNIST", "resnet", "circular", False, (0.77, 0.73), (0.36, 0.33), (0.15, 0.14)),
    Row("CIFAR10", "resnet", "zeros", True, (0.95, 0.90), (0.90, 0.86), (0.42, 0.43)),
    Row("CIFAR10", "resnet", "circular", True, (0.94, 0.90), (0.83, 0.80), (0.35, 0.36)),
    Row("FMNIST", "resnet", "zeros", True, (0.94, 0.90), (0.88, 0.88), (0.68, 0.74)),
    Row("CelebA", "resnet", "zeros", False, (0.96, 0.92), (0.90, 0.88), (0.47, 0.48)),
    Row("CIFAR10", "unet-attention", "zeros", True, (0.77, 0.75), (0.77, 0.74), (0.48, 0.47)),
)
"""Kamb & Ganguli, ICML 2025."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write record and table, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparisons", nargs="+", type=_comparison, metavar="DATA=FILE")
    parser.add_argument("--note", action="append", default=[], help="a line below the table")
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    recorder = record.start("claim", options)
    rows = list(rows_of(options.comparisons))
    path = recorder.write(rows)
    text = table(rows, options.note)
    path.with_suffix(".md").write_text(text)
    print(text)


def _comparison(text: str) -> tuple[str, dict[str, Any]]:
    data, _, file = text.partition("=")
    if data not in DATA:
        raise argparse.ArgumentTypeError(f"data: expected one of {', '.join(DATA)}, got {data}")
    try:
        content: dict[str, Any] = json.loads(Path(file).read_bytes())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{file}: expected a comparison: {error}") from error
    if not isinstance(content, dict) or content.get("format") != "els-compare-1":
        raise argparse.ArgumentTypeError(f"{file}: expected format els-compare-1")
    return data, content


def rows_of(comparisons: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield the paper's rows with their comparisons, then comparisons without a row."""
    of_key: dict[tuple[str, str, str, bool], list[dict[str, Any]]] = {}
    for data, content in comparisons:
        network = content["network"]
        conditional = network["label_count"] > 0
        key = (data, network["architecture"], network["padding"], conditional)
        of_key.setdefault(key, []).append(_ours(content))
    for row in PAPER:
        yield _described(row, of_key.pop(row.key, []))
    for key, ours in of_key.items():
        yield _described(Row(*key), ours)


def _described(row: Row, ours: list[dict[str, Any]]) -> dict[str, Any]:
    paper = {name: getattr(row, name) for name in MACHINES}
    described = {name: value for name, value in vars(row).items() if name not in paper}
    return described | {"paper": None if row.els is None else paper, "ours": ours}


def _ours(content: dict[str, Any]) -> dict[str, Any]:
    network, bank = content["network"], content["bank"]
    return {
        "network": network["name"],
        "parameters": network["parameters"],
        "network_fingerprint": network["fingerprint"],
        "bank_images": bank["images"],
        "bank_fingerprint": bank["fingerprint"],
        "windows": content["windows"],
        "indexing": content["indexing"],
        "machine_steps": content["machine_steps"],
        "count": content["count"],
        "seed": content["seed"],
        "at_network_steps": {
            steps: {name: _figures(one) for name, one in machines.items() if name in MACHINES}
            for steps, machines in content["at_network_steps"].items()
        },
        "protocols": {
            name: _protocol(content, protocol)
            for name, protocol in content.get("protocols", {}).items()
        },
    }


def _protocol(content: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of all machines in a protocol, and the seconds a step of each."""
    steps = protocol["machine_steps"]
    ending = "" if steps == content["machine_steps"] else f"-{steps}"
    results = protocol["at_network_steps"]
    return {
        "machine_steps": steps,
        "seconds_per_step": {
            name: content["seconds_per_step"][name + ending]
            for name in next(iter(results.values()))
        },
        "at_network_steps": {
            steps: {name: _all_figures(one) for name, one in machines.items()}
            for steps, machines in results.items()
        },
    }


def _all_figures(one: dict[str, Any]) -> dict[str, Any]:
    """Return medians and means with their intervals."""
    figures = {name: one[name] for name in MEASURES}
    return figures | {name: one[name] for name in map(_interval_of, MEASURES)}


def _interval_of(measure: str) -> str:
    """Return the name of the interval of a measure in a comparison."""
    return f"{measure.removeprefix('median_')}_interval"


def _figures(one: dict[str, Any]) -> dict[str, Any]:
    names = ("median_pearson_r", "pearson_r_interval", "median_r2", "median_explained")
    figures = {name: one[name] for name in names}
    return figures | {k: one[k] for k in ("share_above_ideal",) if k in one}


def table(rows: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """Return the rows in Markdown."""
    lines = [
        "# Reproduction: images of networks, predicted without training",
        "",
        "Median Pearson r, network at 150 / at 20 steps, in brackets the 95 % bootstrap interval. "
        "Where the paper has a row (Kamb & Ganguli, ICML 2025), its figures stand first. "
        "*Above*: the share of images in which ELS is above the ideal machine (IS). *To paper*: "
        "our ELS median minus the paper's.",
        "",
        "| network | parameters, windows | images, bank | ELS | LS | IS | above | to paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines += _lines(row)
    lines += _terms(rows)
    missing = [(_missing(row), _title(row)) for row in rows]
    for why in NOT_RUN:
        if titles := [title for reason, title in missing if reason == why]:
            lines += ["", f"{why}: {'; '.join(titles)}."]
    lines += [""] + [f"- {note}" for note in notes] if notes else []
    return "\n".join(lines) + "\n"


def _terms(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a table of all measures in both protocols, if a comparison has them."""
    cells = [
        [ours["network"], f"{protocol}, {steps} / {results['machine_steps']}", name]
        + [_with_interval(one, measure) for measure in MEASURES]
        + [f"{results['seconds_per_step'][name]:.3g}"]
        for row in rows
        for ours in row["ours"]
        for protocol, results in ours["protocols"].items()
        for steps, machines in results["at_network_steps"].items()
        for name, one in machines.items()
    ]
    if not cells:
        return
    yield from (
        "",
        "## All measures",
        "",
        "Steps are those of network / machines. r: Pearson's; EV: explained variance, 1 - SSE/SST; "
        "MSE of pixels from 0 to 1; seconds a step of one image; in brackets 95 % bootstrap "
        "intervals.",
        "",
        "| network | protocol, steps | machine | median r | mean r | median EV | mean EV | MSE "
        "| s |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    yield from (f"| {' | '.join(line)} |" for line in cells)
    for data in sorted({row["data"] for row in rows if row["ours"]} & PUBLISHED.keys()):
        found = PUBLISHED[data].items()
        text = "; ".join(f"{name} {ev:.3f}, {mse:.3f}" for name, (ev, mse) in found)
        yield from ("", f"Published for {data} at 10 / 10 steps, mean EV and MSE: {text}.")


def _with_interval(one: dict[str, Any], measure: str) -> str:
    low, high = one[_interval_of(measure)]
    digits = 4 if "mse" in measure else 3
    return f"{one[measure]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _missing(row: dict[str, Any]) -> str | None:
    """Return why a row was not run, or not in the paper's size; None if it was."""
    if row["paper"] is None:
        return None
    plain, gpu, size, data = NOT_RUN
    if not row["ours"]:
        return {"CelebA": data, "CIFAR10": gpu}.get(row["data"], plain)
    largest = max(ours["parameters"] for ours in row["ours"])
    return size if largest < PARAMETERS[row["architecture"]] else None


def _title(row: dict[str, Any]) -> str:
    labels = "with labels" if row["conditional"] else "no labels"
    return f"{row['data']} {row['architecture']} {row['padding']}, {labels}"


def _lines(row: dict[str, Any]) -> Iterator[str]:
    paper = row["paper"]
    if paper is not None:
        medians = (" / ".join(f"{r:.2f}" for r in paper[name]) for name in MACHINES)
        yield f"| **{_title(row)}**: paper | | | {' | '.join(medians)} | | |"
    if not row["ours"]:
        yield "| ours | not yet run | | | | | | |"
    for ours in row["ours"]:
        name = f"ours: {ours['network']}"
        cells = [
            name if paper else f"**{_title(row)}**, no row of the paper: {name}",
            f"{ours['parameters']:,}, {ours['windows']}",
            f"{ours['count']} of {ours['bank_images']:,}",
            *(_cell(ours, name, _median) for name in MACHINES),
            _cell(ours, "els", _above),
            _differences(ours, paper["els"]) if paper else "",
        ]
        yield f"| {' | '.join(cells)} |"


def _cell(ours: dict[str, Any], machine: str, shown: Any) -> str:
    """Return the results of a machine at each number of network steps, – if not run."""
    found = (ours["at_network_steps"].get(steps, {}).get(machine) for steps in STEPS)
    return " / ".join("–" if one is None else shown(one) for one in found)


def _median(one: dict[str, Any]) -> str:
    low, high = one["pearson_r_interval"]
    return f"{one['median_pearson_r']:.3f} [{low:.3f}, {high:.3f}]"


def _above(one: dict[str, Any]) -> str:
    share = one.get("share_above_ideal")
    return "–" if share is None else f"{100 * share:.0f} %"


def _differences(ours: dict[str, Any], paper: Sequence[float]) -> str:
    of_steps = dict(zip(STEPS, paper, strict=True))
    found = {steps: ours["at_network_steps"].get(steps, {}).get("els") for steps in STEPS}
    return " / ".join(
        "–" if one is None else f"{one['median_pearson_r'] - of_steps[steps]:+.3f}"
        for steps, one in found.items()
    )


if __name__ == "__main__":
    main()
