"""A complete comparison: images of network and machines from the same noise, record, figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoiser
from els_service.denoisers.files import write_atomically
from els_service.denoisers.fold_levels import LevelFoldDenoiser, as_text
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import Options, check_options
from els_service.errors import InvalidArgumentError
from els_service.experiments.comparison.figure import draw_figure
from els_service.experiments.comparison.report import summarise
from els_service.experiments.comparison.sampling import (
    Report,
    Samples,
    SampleSpec,
    check_seed,
    sample_images,
)
from els_service.experiments.comparison.subjects import Network, Windows, describe_bank

RECORD_FILE, FIGURE_FILE = "compare.json", "compare.png"
SAMPLES = "samples"
INDEXINGS = {"aligned": "ddim", "released": "ddim_released"}
"""Step indexing of machines; networks are always aligned, as in the published code."""
_SHORT = {"local": "LS", "els": "ELS"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Size of a comparison.

    Raises:
        InvalidArgumentError: A number is out of range.
    """

    count: int = 100
    seed: int = 0
    network_steps: tuple[int, ...] = (20,)
    machine_steps: int = 20
    indexing: str = "aligned"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidArgumentError("count", "at least 1", self.count)
        check_seed(self.seed)
        if self.indexing not in INDEXINGS:
            raise InvalidArgumentError("indexing", " or ".join(INDEXINGS), self.indexing)
        steps = self.network_steps
        if not steps or len(set(steps)) < len(steps):
            raise InvalidArgumentError("network-steps", "numbers, each once", list(steps))
        for number in steps:
            check_options("ddim", Options(steps=number))
        check_options(INDEXINGS[self.indexing], Options(steps=self.machine_steps))


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """Network, bank and machines of a comparison."""

    network: Network
    bank: Bank
    windows: Windows
    machines: Mapping[str, Denoiser]


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """Options of the figure."""

    columns: int = 10
    hidden: tuple[str, ...] = ()
    """Names of omitted machines."""


def compare(
    subjects: Subjects,
    settings: Settings,
    out: Path,
    *,
    figure: FigureOptions | None = None,
    command: str = "",
    reporter: Callable[[str], Report] = lambda title: lambda done, total: None,
) -> dict[str, Any]:
    """Run a comparison, write record, figure and images to ``out``, and return the record.

    Images in ``out`` are not sampled again: an interrupted run is resumed, and one with a larger
    count or other numbers of network steps samples only what is missing.

    Args:
        subjects: network and machines.
        settings: size of the comparison.
        out: folder, created if missing.
        figure: options of the figure.
        command: command line, for the record.
        reporter: returns the callback for every step, for a title.

    Raises:
        LoadError: ``out`` has images of another run; names the setting that differs.
        ElsError: An image is not finite.
    """
    (out / SAMPLES).mkdir(parents=True, exist_ok=True)
    networks = _sample_networks(subjects, settings, out, reporter)
    machines = _sample_machines(subjects, settings, out, reporter)
    record = _record(subjects, settings, networks, machines, command)
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(out / RECORD_FILE, text.encode())
    rows = _rows(settings, networks, machines, figure or FigureOptions())
    write_atomically(out / FIGURE_FILE, draw_figure(rows))
    return record


def _sample_networks(
    subjects: Subjects, settings: Settings, out: Path, reporter: Callable[[str], Report]
) -> dict[int, Samples]:
    network = subjects.network
    labels = network.denoiser.info.label_count
    return {
        steps: sample_images(
            network.denoiser,
            SampleSpec(settings.seed, steps, "ddim", labels),
            settings.count,
            out / SAMPLES / f"network-{steps}.safetensors",
            network.described(),
            reporter(f"network {steps}"),
        )
        for steps in settings.network_steps
    }


def _sample_machines(
    subjects: Subjects, settings: Settings, out: Path, reporter: Callable[[str], Report]
) -> dict[str, Samples]:
    labels = subjects.network.denoiser.info.label_count
    how = SampleSpec(settings.seed, settings.machine_steps, INDEXINGS[settings.indexing], labels)
    return {
        name: sample_images(
            machine,
            how,
            settings.count,
            out / SAMPLES / f"{name}.safetensors",
            describe_machine(machine) | {"bank": subjects.bank.fingerprint},
            reporter(name),
        )
        for name, machine in subjects.machines.items()
    }


def describe_machine(machine: Denoiser) -> dict[str, Any]:
    """Return the description of a machine in a record."""
    info = machine.info
    described: dict[str, Any] = {"machine": info.machine, "padding": info.padding}
    if info.window is not None:
        described["windows"] = {"sigma": list(info.window.sigma), "k": list(info.window.k)}
    if isinstance(machine, LevelFoldDenoiser):
        table = machine.table
        described["folds"] = {"sigma": list(table.sigma), "rho": list(map(as_text, table.rho))}
    return described


def _record(
    subjects: Subjects,
    settings: Settings,
    networks: Mapping[int, Samples],
    machines: Mapping[str, Samples],
    command: str,
) -> dict[str, Any]:
    images = {name: one.images for name, one in machines.items()}
    results = {
        str(steps): summarise(one.images, images, settings.seed) for steps, one in networks.items()
    }
    described = {name: describe_machine(one) for name, one in subjects.machines.items()}
    seconds = {f"network-{steps}": one.seconds for steps, one in networks.items()}
    return {
        "format": "els-compare-1",
        "command": command,
        **asdict(settings),
        "network_steps": list(settings.network_steps),
        "network": subjects.network.described(),
        "bank": describe_bank(subjects.bank, subjects.network.denoiser.info),
        "windows": subjects.windows.source,
        "seconds": seconds | {name: one.seconds for name, one in machines.items()},
        # Compared with the network at the first number of steps.
        "machines": {
            name: described[name] | summary
            for name, summary in results[str(settings.network_steps[0])].items()
        },
        "at_network_steps": results,
    }


def _rows(
    settings: Settings,
    networks: Mapping[int, Samples],
    machines: Mapping[str, Samples],
    figure: FigureOptions,
) -> dict[str, Tensor]:
    shown = min(figure.columns, settings.count)
    shape = next(iter(networks.values())).images.shape[1:]
    noise = seeded_noise(settings.seed, shown, (shape[0], shape[1], shape[2]))(0)
    # At a third of its contrast; otherwise most of it would be black or white.
    rows = {"noise": noise / 3}
    rows |= {f"network {steps}": one.images[:shown] for steps, one in networks.items()}
    rows |= {
        _SHORT.get(name, name): one.images[:shown]
        for name, one in machines.items()
        if name not in figure.hidden
    }
    return rows
