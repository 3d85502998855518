"""A complete comparison: images of network and machines from the same noise, record, figure."""

from __future__ import annotations

import itertools
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
from els_service.denoisers.folded import FoldedDenoiser
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.pca import PcaDenoiser
from els_service.denoisers.samplers import Options, check_options
from els_service.denoisers.smoothed import SmoothedDenoiser
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


@dataclass(frozen=True)
class Protocol:
    """Numbers of steps of a published comparison.

    Attributes:
        network_steps: of the network; the first is that of its figure.
        machine_steps: of the machines.
    """

    network_steps: tuple[int, ...]
    machine_steps: int


PROTOCOLS = {"paper": Protocol((20, 150), 20), "ten-steps": Protocol((10,), 10)}
"""``paper``: Kamb & Ganguli (ICML 2025), median r. ``ten-steps``: Lukoianov et al. (2025) and later
papers, mean explained variance and MSE, both of 10 DDIM steps."""
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
    protocols: tuple[str, ...] = ()
    """Keys of ``PROTOCOLS`` that are run beside the numbers of steps above."""

    @classmethod
    def of_protocols(cls, names: tuple[str, ...], **others: Any) -> Settings:
        """Return settings with the numbers of steps of the first protocol.

        Raises:
            InvalidArgumentError: A name is unknown or given twice, or another setting is wrong.
        """
        if not names or len(set(names)) < len(names) or not set(names) <= PROTOCOLS.keys():
            expected = f"some of {', '.join(PROTOCOLS)}, each once"
            raise InvalidArgumentError("protocols", expected, ", ".join(names) or "none")
        first = PROTOCOLS[names[0]]
        return cls(
            network_steps=first.network_steps,
            machine_steps=first.machine_steps,
            protocols=names,
            **others,
        )

    @property
    def every_network_steps(self) -> list[int]:
        """All numbers of steps of the network, each once."""
        of_protocols = (PROTOCOLS[name].network_steps for name in self.protocols)
        return list(dict.fromkeys(itertools.chain(self.network_steps, *of_protocols)))

    @property
    def every_machine_steps(self) -> list[int]:
        """All numbers of steps of the machines, each once."""
        of_protocols = (PROTOCOLS[name].machine_steps for name in self.protocols)
        return list(dict.fromkeys((self.machine_steps, *of_protocols)))

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
    shown = machines[settings.machine_steps]
    rows = _rows(settings, networks, shown, figure or FigureOptions())
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
        for steps in settings.every_network_steps
    }


def _sample_machines(
    subjects: Subjects, settings: Settings, out: Path, reporter: Callable[[str], Report]
) -> dict[int, dict[str, Samples]]:
    """Return number of steps → machine → images."""
    labels = subjects.network.denoiser.info.label_count
    sampled: dict[int, dict[str, Samples]] = {}
    for steps in settings.every_machine_steps:
        how = SampleSpec(settings.seed, steps, INDEXINGS[settings.indexing], labels)
        ending = _ending(settings, steps)
        sampled[steps] = {
            name: sample_images(
                machine,
                how,
                settings.count,
                out / SAMPLES / f"{name}{ending}.safetensors",
                describe_machine(machine) | {"bank": subjects.bank.fingerprint},
                reporter(name + ending),
            )
            for name, machine in subjects.machines.items()
        }
    return sampled


def _ending(settings: Settings, steps: int) -> str:
    """Return the end of the names of machines at a number of steps."""
    return "" if steps == settings.machine_steps else f"-{steps}"


def describe_machine(machine: Denoiser) -> dict[str, Any]:
    """Return the description of a machine in a record."""
    info = machine.info
    described: dict[str, Any] = {"machine": info.machine or info.kind, "padding": info.padding}
    if info.window is not None:
        described["windows"] = {"sigma": list(info.window.sigma), "k": list(info.window.k)}
    if isinstance(machine, FoldedDenoiser):
        described["fold"] = as_text(info.fold)
    if isinstance(machine, PcaDenoiser):
        table = machine.threshold
        described["thresholds"] = {"sigma": list(table.sigma), "tau": list(table.tau)}
    if isinstance(machine, SmoothedDenoiser):
        described |= {"smoothing": machine.smoothing, "draws": machine.draws, "seed": machine.seed}
    if isinstance(machine, LevelFoldDenoiser):
        folds = machine.table
        described["folds"] = {"sigma": list(folds.sigma), "rho": list(map(as_text, folds.rho))}
    return described


def _record(
    subjects: Subjects,
    settings: Settings,
    networks: Mapping[int, Samples],
    machines: Mapping[int, Mapping[str, Samples]],
    command: str,
) -> dict[str, Any]:
    own = Protocol(settings.network_steps, settings.machine_steps)
    results = _results(own, networks, machines, settings.seed)
    described = {name: describe_machine(one) for name, one in subjects.machines.items()}
    sampled = {f"network-{steps}": one for steps, one in networks.items()}
    for steps, of_steps in machines.items():
        ending = _ending(settings, steps)
        sampled |= {name + ending: one for name, one in of_steps.items()}
    return {
        "format": "els-compare-1",
        "command": command,
        **asdict(settings),
        "network_steps": list(settings.network_steps),
        "network": subjects.network.described(),
        "bank": describe_bank(subjects.bank, subjects.network.denoiser.info),
        "windows": subjects.windows.source,
        "windows_by_machine": {
            name: subjects.windows.of(name).source
            for name, machine in subjects.machines.items()
            if machine.info.window is not None
        },
        "seconds": {name: one.seconds for name, one in sampled.items()},
        "seconds_per_step": {name: one.seconds_per_step for name, one in sampled.items()},
        # Compared with the network at the first number of steps.
        "machines": {
            name: described[name] | summary
            for name, summary in results[str(settings.network_steps[0])].items()
        },
        "at_network_steps": results,
        "protocols": {
            name: {
                "network_steps": list(PROTOCOLS[name].network_steps),
                "machine_steps": PROTOCOLS[name].machine_steps,
                "at_network_steps": _results(PROTOCOLS[name], networks, machines, settings.seed),
            }
            for name in settings.protocols
        },
    }


def _results(
    protocol: Protocol,
    networks: Mapping[int, Samples],
    machines: Mapping[int, Mapping[str, Samples]],
    seed: int,
) -> dict[str, Any]:
    """Return number of network steps → machine → agreement."""
    images = {name: one.images for name, one in machines[protocol.machine_steps].items()}
    return {
        str(steps): summarise(networks[steps].images, images, seed)
        for steps in protocol.network_steps
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
    rows |= {f"network {n}": networks[n].images[:shown] for n in settings.network_steps}
    rows |= {
        _SHORT.get(name, name): one.images[:shown]
        for name, one in machines.items()
        if name not in figure.hidden
    }
    return rows
