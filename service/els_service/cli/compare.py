"""``els-server compare``: compares a network with machines."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from els_service.cli.experiments import (
    Bank,
    BankLimit,
    Device,
    ExperimentCommand,
    Models,
    Threads,
    command_line,
    one_of,
    positive_integer,
    positive_integers,
    prepare_device,
    words,
)
from els_service.cli.progress import Progress
from els_service.errors import InvalidArgumentError
from els_service.experiments.comparison.run import INDEXINGS, FigureOptions, Settings, Subjects
from els_service.experiments.comparison.run import compare as run_comparison
from els_service.experiments.comparison.subjects import (
    build_machines,
    find_windows,
    open_network_and_bank,
)

app = typer.Typer(rich_markup_mode=None)

Network = Annotated[str, typer.Option(metavar="NAME", help="A served model or a model folder.")]
Machines = Annotated[
    str,
    typer.Option(
        help="els, local, ideal, equivariant, with the network's padding; or MACHINE-PADDING; "
        "els+fold has the folds of `calibrate --folds`."
    ),
]
Windows = Annotated[
    str,
    typer.Option(
        metavar="TABLE",
        help="calibrated: those of the network's folder, or auto; an odd number; file or folder.",
    ),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder of record and figure.")]
Count = Annotated[int, typer.Option(parser=positive_integer("count"), help="Number of images.")]
Steps = Annotated[
    int,
    typer.Option(
        parser=positive_integer("steps"), help="Steps of the network and of the machines."
    ),
]
NetworkSteps = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N]",
        help="Steps of the network, such as 20,150; `machines` in the record has the first.",
    ),
]
MachineSteps = Annotated[
    int | None,
    typer.Option(
        parser=positive_integer("machine-steps"), metavar="N", help="Steps of the machines."
    ),
]
Indexing = Annotated[
    str,
    typer.Option(
        parser=one_of("indexing", INDEXINGS),
        help=f"Step indexing of the machines: {', '.join(INDEXINGS)}.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Columns = Annotated[
    int, typer.Option(parser=positive_integer("columns"), help="Number of images in the figure.")
]
FigureWithout = Annotated[str, typer.Option(help="Machines to omit from the figure.")]


@app.command("compare", cls=ExperimentCommand)
def compare(
    context: typer.Context,
    network: Network,
    bank: Bank,
    out: Out,
    machines: Machines = "els,local,ideal",
    windows: Windows = "calibrated",
    bank_limit: BankLimit = None,
    models: Models = None,
    device: Device = "auto",
    threads: Threads = 0,
    count: Count = Settings.count,
    steps: Steps = Settings.machine_steps,
    network_steps: NetworkSteps = None,
    machine_steps: MachineSteps = None,
    indexing: Indexing = Settings.indexing,
    seed: Seed = Settings.seed,
    columns: Columns = FigureOptions.columns,
    figure_without: FigureWithout = "",
) -> None:
    """Compare a network with machines on images from the same noise.

    Writes compare.json and compare.png. The same command resumes an interrupted run.
    """
    settings = Settings(
        count=count,
        seed=seed,
        network_steps=positive_integers("network-steps", network_steps) or (steps,),
        machine_steps=machine_steps or steps,
        indexing=indexing,
    )
    names = words(machines)
    figure = FigureOptions(columns=columns, hidden=words(figure_without))
    for name in figure.hidden:
        if name not in names:
            raise InvalidArgumentError("figure-without", f"some of {', '.join(names)}", name)
    torch_device = prepare_device(device, threads)
    trained, images = open_network_and_bank(network, models, bank, bank_limit, torch_device)
    table = find_windows(trained, windows)
    info = trained.denoiser.info
    built = build_machines(
        names, images, info, windows=table.table, folds=table.folds, device=torch_device
    )
    with ExitStack() as bars:
        record = run_comparison(
            Subjects(network=trained, bank=images, windows=table, machines=built),
            settings,
            out,
            figure=figure,
            command=command_line(context),
            reporter=lambda title: bars.enter_context(Progress(title)),
        )
    for line in lines(record):
        print(line)
    print(f"written: {out}")


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
