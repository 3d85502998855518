"""``els-server calibrate``: fits a machine's windows to a network."""

from __future__ import annotations

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
)
from els_service.cli.progress import Progress
from els_service.errors import InvalidArgumentError
from els_service.experiments.calibrate import CalibrationSettings, calibrate_folder
from els_service.experiments.calibrate_numbers import (
    MACHINES,
    SMOOTHING,
    THRESHOLD,
    NumberSettings,
    calibrate_number_folder,
    number_of,
    parse_candidates,
)
from els_service.experiments.comparison.calibration import SEARCHES
from els_service.experiments.comparison.folds import parse_folds
from els_service.experiments.comparison.machines import Smoothing
from els_service.experiments.comparison.sampling import check_seed
from els_service.experiments.comparison.subjects import find_windows, open_network_and_bank
from els_service.repository import WINDOWS_FILE

app = typer.Typer(rich_markup_mode=None)


class _Calibrate(ExperimentCommand):
    """Command ``calibrate``; ``calibrate --held-out`` is a command with other arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; with ``--held-out`` run that command instead."""
        if "--held-out" in args:
            from els_service.cli.held_out import app as held_out

            others = [argument for argument in args if argument != "--held-out"]
            raise typer.Exit(held_out(others, prog_name="els-server calibrate --held-out"))
        return super().parse_args(ctx, args)


Network = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Name of a served model, or a network's model folder."),
]
Machine = Annotated[
    str, typer.Option(help="els, local, MACHINE-PADDING, pspc, pca, pca-released, smoothed.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Analytic model folder, created if missing. [default: MODEL-MACHINE next to MODEL]",
    ),
]
Samples = Annotated[
    int, typer.Option(parser=positive_integer("samples"), help="Trajectories of the network.")
]
Steps = Annotated[
    int, typer.Option(parser=positive_integer("steps"), help="Steps, and levels of the table.")
]
Seed = Annotated[int, typer.Option(help="Seed of the noise, unlike that of `compare`.")]
Search = Annotated[
    str,
    typer.Option(
        parser=one_of("search", SEARCHES), help="all: all windows; climb: 3 times faster."
    ),
]
Folds = Annotated[
    str | None,
    typer.Option(metavar="RHO[,RHO]", help="Folds to try beside none, such as 0.2,0.5,inf."),
]
Windows = Annotated[
    str | None,
    typer.Option(metavar="K[,K]", help="Odd candidates. [default: from 3 to the side]"),
]


Thresholds = Annotated[
    str | None,
    typer.Option(metavar="TAU[,TAU]", help="Candidates of pca. [default: 0.005 to 0.3]"),
]
Etas = Annotated[
    str | None,
    typer.Option(
        "--smoothing", metavar="ETA[,ETA]", help="Candidates of smoothed. [default: 0 to 0.5]"
    ),
]
Draws = Annotated[
    int, typer.Option(parser=positive_integer("draws"), help="Draws of smoothed, up to 1024.")
]


@app.command("calibrate", cls=_Calibrate)
def calibrate(
    context: typer.Context,
    network: Network,
    bank: Bank,
    machine: Machine = CalibrationSettings.machine,
    out: Out = None,
    samples: Samples = CalibrationSettings.samples,
    steps: Steps = CalibrationSettings.steps,
    seed: Seed = CalibrationSettings.seed,
    search: Search = CalibrationSettings.search,
    windows: Windows = None,
    folds: Folds = None,
    thresholds: Thresholds = None,
    smoothing: Etas = None,
    draws: Draws = Smoothing.draws,
    bank_limit: BankLimit = None,
    models: Models = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Find the windows by noise level for which a machine's score is closest to a network's.

    Writes windows.yaml and calibration.json to an analytic model folder; with --folds also
    folds.yaml, window and fold by level; with --machine pca thresholds.yaml; with --machine
    smoothed one smoothing for all levels. The same command resumes an interrupted run. Without a
    network: --held-out MODEL_FOLDER, with a --help of its own.
    """
    check_seed(seed)
    options = {"windows": windows, "folds": folds}
    candidates = {THRESHOLD.field: thresholds, SMOOTHING.field: smoothing}
    own = candidates.pop(number_of(machine).field) if machine in MACHINES else None
    others = candidates | options if machine in MACHINES else candidates
    for field, given in others.items():
        if given is not None:
            raise InvalidArgumentError(field, f"none for {machine}", given)
    if machine in MACHINES:
        number = NumberSettings(
            machine=machine,
            samples=samples,
            steps=steps,
            seed=seed,
            candidates=parse_candidates(number_of(machine), own),
            draws=Smoothing(draws=draws).draws,
        )
    else:
        settings = CalibrationSettings(
            machine=machine,
            samples=samples,
            steps=steps,
            seed=seed,
            search=search,
            windows=positive_integers("windows", windows),
            folds=parse_folds(folds),
        )
    torch_device = prepare_device(device, threads)
    trained, images = open_network_and_bank(network, models, bank, bank_limit, torch_device)
    with Progress("calibrate") as progress:
        common: dict[str, Any] = {
            "bank_file": bank,
            "device": torch_device,
            "command": command_line(context),
            "progress": progress,
        }
        if machine in MACHINES:
            written, found = calibrate_number_folder(trained, images, number, out, **common)
        else:
            written, table = calibrate_folder(trained, images, settings, out, **common)
    if machine in MACHINES:
        print(f"{number_of(machine).field} {' '.join(map(str, found))}\nwritten: {written}")
        return
    print(f"windows {' '.join(map(str, table.k))}\nwritten: {written}")
    if find_windows(trained).source != f"{written.resolve().name}/{WINDOWS_FILE}":
        print(f"for a comparison with these windows: --windows {written}")
