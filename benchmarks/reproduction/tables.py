"""Tables of a record in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.reproduction.published import DATA, MACHINES, MEASURES, PARAMETERS, PUBLISHED, STEPS
from benchmarks.reproduction.rows import interval_of
from benchmarks.reproduction.statements import VERDICTS, Verdict, figures_of, verdicts

NOT_RUN = (
    "Not yet run",
    "Not yet run, for want of a GPU",
    "Not yet run at the paper's size, for want of a GPU",
    "Not run, as the data set of faces is not available",
)
_ORDER = ("els", "els+fold", "local", "pspc", "pca", "pca-released", "wiener", "smoothed", "ideal")
_NONE = "–"


def document(rows: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """Return all tables, as the text beside a record."""
    parts = [
        "# Reproduction: images of networks, predicted without training",
        claim(rows),
        not_run(rows),
        "\n".join(f"- {note}" for note in notes),
        all_measures(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def claim(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of networks and machines, the verdicts, and the conditions."""
    parts = ["## Networks and machines", _explained(), _table(_claim_lines(rows), _HEADER)]
    if found := verdicts(rows):
        parts += ["## What holds", _WHAT_HOLDS, _table(_verdict_lines(found), _VERDICTS)]
    if trainings := list(_trainings(rows)):
        header = "| network | parameters | steps | last loss | hours | command |"
        parts += ["## Conditions", _CONDITIONS, _table(trainings, header)]
    return "\n\n".join(parts)


_HEADER = (
    "| network | machine | median r, 150 steps | median r, 20 steps | paper: 150 / 20 (ours less) "
    "| mean EV, 10 steps | MSE, 10 steps | published: EV, MSE | s a step |"
)
_VERDICTS = f"| statement | {' | '.join(VERDICTS)} |"
_WHAT_HOLDS = (
    "A statement holds, or does not, where the 95 % interval of the difference leaves out 0; "
    "otherwise it is open. Differences are those on the same images (the mean of differences in "
    "EV, the median of those in r); where a record has none, two intervals must not overlap. A "
    "figure of the paper is reached where the interval lies above it."
)
_CONDITIONS = (
    "Trainings of the networks whose records were at hand; the loss is that of the last log row."
)


def _explained() -> str:
    return (
        "Two protocols on the same noise. *Median r*: Pearson's, network at 150 or 20 steps, "
        "machines at 20 (Kamb & Ganguli, ICML 2025). *Mean EV*: explained variance, 1 - SSE/SST, "
        "and *MSE* of pixels from 0 to 1, both at 10 steps (GoldDiff and others). In brackets 95 % "
        "bootstrap intervals over images. *s a step*: seconds of one image, in the protocol of 10 "
        "steps if it was run."
    )


def _table(lines: Iterator[str] | Sequence[str], header: str) -> str:
    return "\n".join([header, "|" + (header.count("|") - 1) * "---|", *lines])


def _claim_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for row in sorted(rows, key=lambda row: DATA.index(row["data"])):
        for ours in row["ours"]:
            name = _network(row, ours)
            for machine in machines_of(ours):
                yield f"| {' | '.join((name, *_cells(row, ours, machine)))} |"
                name = f"`{ours['network']}`"


def _network(row: dict[str, Any], ours: dict[str, Any]) -> str:
    return (
        f"**`{ours['network']}`**: {_title(row)}; {ours['parameters']:,} parameters; "
        f"{ours['count']} images, bank of {ours['bank_images']:,}"
    )


def machines_of(ours: dict[str, Any]) -> list[str]:
    """Return the names of all machines that were compared with a network."""
    found: dict[str, None] = {}
    for results in (
        ours["at_network_steps"],
        *(one["at_network_steps"] for one in ours.get("protocols", {}).values()),
    ):
        for machines in results.values():
            found |= dict.fromkeys(machines)
    known = [name for name in _ORDER if name in found]
    return [*known, *(name for name in found if name not in known)]


def _cells(row: dict[str, Any], ours: dict[str, Any], machine: str) -> Iterator[str]:
    yield MACHINES.get(machine, f"`{machine}`")
    medians = [figures_of(ours, "paper", steps).get(machine) for steps in STEPS]
    yield from (_interval(one, "median_pearson_r") for one in medians)
    paper = (row["paper"] or {}).get(machine)
    yield _NONE if paper is None else _beside(paper, medians)
    later = figures_of(ours, "ten-steps", "10").get(machine)
    yield from (_interval(later, measure) for measure in ("mean_explained", "mean_mse"))
    published = PUBLISHED.get(row["data"], {}).get(machine)
    yield _NONE if published is None else f"{published[0]:.3f}, {published[1]:.3f}"
    yield _seconds(ours, machine)


def _beside(paper: Sequence[float], medians: Sequence[dict[str, Any] | None]) -> str:
    """Return the paper's medians and ours less them."""
    less = (
        _NONE if one is None else f"{one['median_pearson_r'] - value:+.3f}"
        for one, value in zip(medians, paper, strict=True)
    )
    return f"{' / '.join(f'{value:.2f}' for value in paper)} ({' / '.join(less)})"


def _interval(one: dict[str, Any] | None, measure: str) -> str:
    if one is None:
        return _NONE
    low, high = one[interval_of(measure)]
    digits = 4 if "mse" in measure else 3
    return f"{one[measure]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _seconds(ours: dict[str, Any], machine: str) -> str:
    for protocol in ("ten-steps", "paper"):
        found = ours.get("protocols", {}).get(protocol, {}).get("seconds_per_step", {})
        if machine in found:
            return f"{found[machine]:.3g}"
    return _NONE


def _verdict_lines(found: Sequence[Verdict]) -> Iterator[str]:
    """Yield a line for each statement, with a cell for each verdict."""
    for statement, source in dict.fromkeys((one.statement, one.source) for one in found):
        cells = [
            "<br>".join(
                f"`{one.network}`: {one.numbers}"
                for one in found
                if (one.statement, one.source, one.verdict) == (statement, source, verdict)
            )
            for verdict in VERDICTS
        ]
        yield f"| {statement} ({source}) | {' | '.join(cells)} |"


def _trainings(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    # A network may be there twice, with other protocols.
    trained = {
        ours["network"]: ours for row in rows for ours in row["ours"] if ours.get("training")
    }
    for name, ours in trained.items():
        training = ours["training"]
        steps = f"{training['step']:,} of {training['steps']:,}"
        yield (
            f"| `{name}` | {ours['parameters']:,} | {steps} | {training['loss']:.4f} "
            f"| {training['seconds'] / 3600:.1f} | `{training['command']}` |"
        )


def not_run(rows: Sequence[dict[str, Any]]) -> str:
    """Return the paper's rows that were not run, or not in its size, by reason."""
    missing = [(_missing(row), _title(row)) for row in rows]
    found = {why: [title for reason, title in missing if reason == why] for why in NOT_RUN}
    return "\n\n".join(f"{why}: {'; '.join(titles)}." for why, titles in found.items() if titles)


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


def all_measures(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of all measures in both protocols, if a comparison has them."""
    cells = [
        [f"`{ours['network']}`", f"{protocol}, {steps} / {results['machine_steps']}", name]
        + [_interval(one, measure) for measure in MEASURES]
        for row in rows
        for ours in row["ours"]
        for protocol, results in ours.get("protocols", {}).items()
        for steps, machines in results["at_network_steps"].items()
        for name, one in machines.items()
    ]
    header = (
        "| network | protocol, steps | machine | median r | mean r | median EV | mean EV | MSE |"
    )
    lines = [f"| {' | '.join(line)} |" for line in cells]
    text = "Steps are those of network / machines."
    return "\n\n".join(("## All measures", text, _table(lines, header))) if lines else ""
