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
    non_negative,
    one_of,
    positive_integer,
    positive_integers,
    prepare_device,
    words,
)
from els_service.cli.progress import Progress
from els_service.errors import InvalidArgumentError
from els_service.experiments.comparison.machines import (
    RULES,
    Smoothing,
    build_machines,
    read_thresholds_of,
)
from els_service.experiments.comparison.run import (
    INDEXINGS,
    PROTOCOLS,
    FigureOptions,
    Settings,
    Subjects,
)
from els_service.experiments.comparison.run import compare as run_comparison
from els_service.experiments.comparison.subjects import open_network_and_bank, windows_of

app = typer.Typer(rich_markup_mode=None)

Network = Annotated[str, typer.Option(metavar="NAME", help="A served model or a model folder.")]
Machines = Annotated[
    str,
    typer.Option(
        help="els, local, ideal, equivariant, with the network's padding; or MACHINE-PADDING; "
        "els+fold has the folds of `calibrate --folds`; wiener, pca, pca-released, pspc, "
        "smoothed."
    ),
]
Windows = Annotated[
    str,
    typer.Option(
        metavar="[TABLE][,MACHINE=TABLE]",
        help="calibrated: those of the network's folder, or auto; an odd number; file or folder. "
        "For single machines: els=FOLDER,pspc=FOLDER.",
    ),
]
Thresholds = Annotated[
    str | None,
    typer.Option(
        metavar="[TABLE][,MACHINE=TABLE]",
        help="Of pca: a number, or a file or folder with thresholds. For one: pca=FOLDER.",
    ),
]
Eta = Annotated[
    float,
    typer.Option("--smoothing", parser=non_negative("smoothing"), help="η of smoothed, from 0."),
]
Draws = Annotated[
    int,
    typer.Option(parser=positive_integer("draws"), help="Draws of smoothed, from 1 to 1024."),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder of record and figure.")]
Count = Annotated[int, typer.Option(parser=positive_integer("count"), help="Number of images.")]
Steps = Annotated[
    int | None,
    typer.Option(
        parser=positive_integer("steps"),
        help=f"Steps of the network and of the machines. [default: {Settings.machine_steps}]",
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
Protocols = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME]",
        help=f"Published numbers of steps, {', '.join(PROTOCOLS)}, in place of the options above.",
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
    thresholds: Thresholds = None,
    smoothing: Eta = Smoothing.eta,
    draws: Draws = Smoothing.draws,
    bank_limit: BankLimit = None,
    models: Models = None,
    device: Device = "auto",
    threads: Threads = 0,
    count: Count = Settings.count,
    steps: Steps = None,
    network_steps: NetworkSteps = None,
    machine_steps: MachineSteps = None,
    protocols: Protocols = None,
    indexing: Indexing = Settings.indexing,
    seed: Seed = Settings.seed,
    columns: Columns = FigureOptions.columns,
    figure_without: FigureWithout = "",
) -> None:
    """Compare a network with machines on images from the same noise.

    Writes compare.json and compare.png. The same command resumes an interrupted run.
    """
    settings = _settings(
        protocols,
        {"steps": steps, "network-steps": network_steps, "machine-steps": machine_steps},
        count=count,
        seed=seed,
        indexing=indexing,
    )
    names, smooth = words(machines), Smoothing(smoothing, draws)
    tau = read_thresholds_of(thresholds, [name for name in names if name in RULES])
    figure = FigureOptions(columns=columns, hidden=words(figure_without))
    for name in figure.hidden:
        if name not in names:
            raise InvalidArgumentError("figure-without", f"some of {', '.join(names)}", name)
    torch_device = prepare_device(device, threads)
    trained, images = open_network_and_bank(network, models, bank, bank_limit, torch_device)
    table = windows_of(trained, windows, names)
    info = trained.denoiser.info
    built = build_machines(
        names,
        images,
        info,
        windows=table,
        thresholds=tau,
        smoothing=smooth,
        device=torch_device,
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


def _settings(protocols: str | None, steps: dict[str, Any], **others: Any) -> Settings:
    """Return the settings of a command line, which has protocols or numbers of steps."""
    if protocols is not None:
        for field, given in steps.items():
            if given is not None:
                raise InvalidArgumentError(field, "none beside protocols", given)
        return Settings.of_protocols(words(protocols), **others)
    both = steps["steps"] or Settings.machine_steps
    return Settings(
        network_steps=positive_integers("network-steps", steps["network-steps"]) or (both,),
        machine_steps=steps["machine-steps"] or both,
        **others,
    )


def lines(record: dict[str, Any]) -> list[str]:
    """Return a table of medians with intervals, one line for each machine and number of steps."""
    own = {name: w for name, w in record["windows_by_machine"].items() if w != record["windows"]}
    windows = ", ".join([record["windows"], *(f"{name} {table}" for name, table in own.items())])
    found = [f"network {record['network']['name']}, windows {windows}"]
    protocols = record["protocols"] or {"": record}
    for protocol, results in protocols.items():
        if protocol:
            found.append(f"protocol {protocol}, machines at {results['machine_steps']} steps")
        for steps, machines in results["at_network_steps"].items():
            found += [_line(name, steps, one) for name, one in machines.items()]
    return found


def _line(name: str, steps: str, one: dict[str, Any]) -> str:
    low, high = one["pearson_r_interval"]
    text = f"{name:<12} network at {steps} steps: "
    text += f"median r {one['median_pearson_r']:.3f} ({low:.3f} to {high:.3f}), "
    text += f"explained {one['median_explained']:.3f} (mean {one['mean_explained']:.3f}), "
    text += f"MSE {one['mean_mse']:.4f}"
    if "share_above_ideal" in one:
        text += f", above ideal in {100 * one['share_above_ideal']:.0f} %"
    return text
