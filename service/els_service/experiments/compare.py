"""Compare a network with machines: ``python -m els_service.experiments.compare``.

Requires only torch, numpy, safetensors, PyYAML and Pillow.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from els_service.errors import InvalidArgumentError
from els_service.experiments.command_line import (
    Progress,
    listed,
    positive,
    prepared_device,
    refusing,
)
from els_service.experiments.comparison.options import add_shared
from els_service.experiments.comparison.run import (
    INDEXINGS,
    FigureOptions,
    Settings,
    Subjects,
    compare,
)
from els_service.experiments.comparison.subjects import (
    build_machines,
    find_windows,
    open_bank,
    open_network,
)


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run a comparison; return the exit code: 0, 2 for invalid input, 130 for Ctrl-C.

    Args:
        arguments: without the program's name; None for sys.argv.
        program: name of the command in the help and the record.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(program or "python -m els_service.experiments.compare")
    options = parser.parse_args(arguments)
    command = shlex.join([*parser.prog.split(), *arguments])
    return refusing(parser.prog, lambda: _compare(options, command))


def _compare(options: argparse.Namespace, command: str) -> None:
    settings = Settings(
        count=options.count,
        seed=options.seed,
        network_steps=options.network_steps or (options.steps,),
        machine_steps=options.machine_steps or options.steps,
        indexing=options.indexing,
    )
    for name in options.figure_without:
        if name not in options.machines:
            expected = f"some of {', '.join(options.machines)}"
            raise InvalidArgumentError("figure-without", expected, name)
    device = prepared_device(options)
    network = open_network(options.network, options.models, device)
    info = network.denoiser.info
    windows = find_windows(network, options.windows)
    bank = open_bank(options.bank, info, options.bank_limit)
    machines = build_machines(options.machines, bank, info, windows=windows.table, device=device)
    record = compare(
        Subjects(network=network, bank=bank, windows=windows, machines=machines),
        settings,
        options.out,
        look=FigureOptions(columns=options.columns, hidden=options.figure_without),
        command=command,
        reporter=Progress,
    )
    for line in lines(record):
        print(line)
    print(f"written: {options.out}")


def lines(record: dict[str, Any]) -> list[str]:
    """Return a table of medians with intervals, one line for each machine and number of steps."""
    found = [f"network {record['network']['name']}, windows {record['windows']}"]
    for steps, machines in record["at_network_steps"].items():
        for name, one in machines.items():
            low, high = one["pearson_r_interval"]
            text = f"{name:<12} network at {steps} steps: "
            text += f"median r {one['median_pearson_r']:.3f} ({low:.3f} to {high:.3f}), "
            text += f"explained {one['median_explained']:.3f}"
            if "share_above_ideal" in one:
                text += f", above ideal in {100 * one['share_above_ideal']:.0f} %"
            found.append(text)
    return found


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program,
        description="Sample images with a network and with machines from the same noise and "
        "measure their agreement; writes compare.json and compare.png. The same command resumes an "
        "interrupted run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--network", required=True, metavar="NAME", help="a served model or a model folder")
    add(
        "--machines",
        type=_names,
        default=("els", "local", "ideal"),
        help="els, local, ideal, equivariant, with the network's padding; or MACHINE-PADDING",
    )
    add(
        "--windows",
        default="calibrated",
        metavar="TABLE",
        help="calibrated: those of the network's folder, or auto; an odd number; file or folder",
    )
    add_shared(parser)
    _add_amounts(parser)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of record and figure")
    add(
        "--columns",
        type=positive("columns"),
        default=FigureOptions.columns,
        help="number of images in the figure",
    )
    add("--figure-without", type=_names, default=(), help="machines to omit from the figure")
    return parser


def _add_amounts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--count", type=positive("count"), default=Settings.count, help="images")
    add("--steps", type=positive("steps"), default=Settings.machine_steps, help="of both")
    add(
        "--network-steps",
        type=listed("network-steps"),
        metavar="N[,N]",
        help="steps of the network, such as 20,150; `machines` in the record has the first",
    )
    add("--machine-steps", type=positive("machine-steps"), metavar="N", help="steps of machines")
    add("--indexing", choices=tuple(INDEXINGS), default=Settings.indexing, help="of machines")
    add("--seed", type=int, default=Settings.seed, help="seed of the noise")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
