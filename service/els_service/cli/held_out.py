"""``els-server calibrate --held-out``: windows for any bank, without a network."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from els_kernels import GEOMETRIES, max_window
from els_service.cli.progress import Progress
from els_service.denoisers.banks import Bank
from els_service.denoisers.mixed_banks import load_any_bank, one_size
from els_service.denoisers.windows import default_windows
from els_service.errors import ElsError, InvalidArgumentError, LoadError
from els_service.experiments.held_out import (
    Chosen,
    Sampling,
    affordable,
    choose_windows,
    part_of,
)
from els_service.experiments.model_text import set_key
from els_service.repository import bundled_models
from els_service.repository.specs import AnalyticSpec
from els_service.yaml_files import read_yaml, validate

_SPEC = TypeAdapter(AnalyticSpec)
_FORMAT = "els-held-out-1"

app = typer.Typer(add_completion=False)


@app.command()
def held_out(
    model: Annotated[Path, typer.Argument(help="Folder of an analytic model, with model.yaml.")],
    queries: Annotated[
        int, typer.Option(min=8, help="Random pixels at which errors are measured.")
    ] = Sampling.count,
    seed: Annotated[int, typer.Option(min=0, help="Seed of images, pixels and noise.")] = 0,
    by_label: Annotated[
        bool,
        typer.Option(help="Denoise each image by images of its own label, as labelled requests."),
    ] = False,
    windows: Annotated[
        str, typer.Option(help="Odd candidates, K,K,… [default: 1 to the side, at most 33]")
    ] = "",
    images: Annotated[
        int | None,
        typer.Option(
            min=64, help="Use about so many images of the bank. [default: some minutes' worth]"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Do not change model.yaml.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="0: as many as torch chooses.")] = 0,
) -> None:
    """Choose a bank's windows by leave-one-out denoising; writes `window:` in model.yaml.

    At each noise level the window is chosen whose machine denoises images of the bank best when
    the bank lacks them. No network is needed. The errors are those of random pixels, exact at each,
    and printed with their standard errors.
    """
    if threads:
        torch.set_num_threads(threads)
    try:
        found = _choose(
            model, Sampling(queries, seed, by_label), _listed(windows), images, device, not dry_run
        )
    except (ElsError, OSError) as error:
        typer.echo("els-server calibrate: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        typer.echo("els-server calibrate: interrupted: nothing was written", err=True)
        raise typer.Exit(130) from error
    if as_json:
        typer.echo(json.dumps(_described(found)))
        return
    _print(found)
    typer.echo(f"not written: {model}" if dry_run else f"written: window in {model / 'model.yaml'}")


def _choose(
    model: Path,
    how: Sampling,
    windows: tuple[int, ...] | None,
    images: int | None,
    device: str,
    write: bool,
) -> Chosen:
    path = model / "model.yaml"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InvalidArgumentError("device", "cpu, or cuda where torch sees a GPU", device)
    if write and model.resolve().is_relative_to(bundled_models().resolve()):
        raise InvalidArgumentError("MODEL", "a folder outside the package, or --dry-run", model)
    content = read_yaml(path)
    if not isinstance(content, dict) or content.get("kind") != "analytic":
        raise LoadError(path, "kind: expected analytic, which has a bank and a window, got another")
    spec = validate(_SPEC, content, path)
    if spec.fold != 0 or spec.padding == "inside":
        expected = "expected fold 0 and another padding than inside, whose errors are measured"
        raise LoadError(path, f"fold: {expected}, got {spec.fold} with {spec.padding}")
    geometry = GEOMETRIES.get((spec.machine, spec.padding))
    if spec.machine in ("ideal", "equivariant") or geometry is None:
        got = f"{spec.machine} with {spec.padding}"
        raise LoadError(path, f"machine: expected els or local, which have a window, got {got}")
    whole = one_size(load_any_bank(model / spec.bank), "calibration by held-out images")
    bank = _part(whole, images or affordable(whole, geometry, how, windows), images is None)
    progress: dict[str, Progress] = {}
    with ExitStack() as bars:

        def report(name: str, done: int, total: int) -> None:
            if name not in progress:
                progress[name] = bars.enter_context(Progress(name))
            progress[name](done, total)

        chosen = choose_windows(
            bank,
            geometry,
            how=how,
            windows=windows,
            also=default_windows().clipped(max_window(geometry, *bank.shape[1:])),
            device=device,
            report=report,
        )
    if write:
        table = chosen.table
        set_key(path, "window", {"sigma": list(table.sigma), "k": list(table.k)})
    return chosen


def _part(whole: Bank, images: int, is_default: bool) -> Bank:
    """Return about so many images of a bank; says so unless the number was given."""
    if images >= len(whole.images):
        return whole
    bank = part_of(whole, math.ceil(len(whole.images) / images))
    if is_default and len(bank.images) < len(whole.images):
        some, all_ = len(bank.images), len(whole.images)
        times = f"--images {all_} takes all of them, and {all_ / some:.0f} times as long"
        typer.echo(f"using {some} of {all_} images, evenly: {times}", err=True)
    return bank


def _listed(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and part.isascii() for part in parts):
        raise typer.BadParameter(f"windows: expected odd numbers K,K,…, got {text}")
    return tuple(sorted(set(map(int, parts))))


def _described(found: Chosen) -> dict[str, Any]:
    errors, published = found.errors, _published(found)
    levels = []
    for sigma, k in zip(found.table.sigma, found.table.k, strict=True):
        tried = {
            str(window): dict(zip(_NAMES, errors.mean((sigma, window)), strict=True))
            for window in errors.windows(sigma)
        }
        gain = errors.difference((sigma, published[sigma]), (sigma, k))
        levels.append(
            {
                "sigma": sigma,
                "k": k,
                "windows": tried,
                "fashion_mnist_resnet": {
                    "k": published[sigma],
                    **dict(zip(("excess", "standard_error"), gain, strict=True)),
                },
            }
        )
    return {
        "format": _FORMAT,
        "queries": len(errors.images),
        "images": found.images,
        "levels": levels,
    }


_NAMES = "error", "standard_error"


def _published(found: Chosen) -> dict[float, int]:
    """Return the window of the default table at each level."""
    table = default_windows()
    return {
        sigma: min(int(k), max(found.errors.windows(sigma)))
        for sigma, k in zip(found.table.sigma, table.at(_sigmas(found)), strict=True)
    }


def _sigmas(found: Chosen) -> Any:
    return torch.tensor(found.table.sigma, dtype=torch.float64).numpy()


def _print(found: Chosen) -> None:
    """Print the error of each level and window; the chosen ones are in brackets."""
    errors, published = found.errors, _published(found)
    windows = sorted({k for _, k in errors.cells})
    table = Table("sigma", *(f"k={k}" for k in windows), "± paired", "gain", box=None)
    for sigma, k in zip(found.table.sigma, found.table.k, strict=True):
        row = [f"{sigma:.3g}"]
        for window in windows:
            if (sigma, window) not in errors.cells:
                row.append("")
                continue
            error = f"{errors.mean((sigma, window))[0]:.2g}"
            row.append(f"[bold]\\[{error}][/bold]" if window == k else error)
        best, other = errors.mean((sigma, k))[0], (sigma, published[sigma])
        excess, spread = errors.difference(other, (sigma, k))
        # Of the difference, as that is what decides between two windows.
        row += [f"{spread:.1g}", f"{100 * excess / (best + excess):.0f} %"]
        table.add_row(*row)
    typer.echo("mean squared error of images in [-1, 1]; [chosen]; blank: not tried")
    Console(width=max(80, 9 * len(windows) + 30)).print(table)
    typer.echo(
        "gain: less error than with the windows fashion-mnist-resnet; ± paired: standard error "
        f"of that difference, over {len(errors.images)} pixels of {found.images} images"
    )
