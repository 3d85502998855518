"""The command ``els bench``: generates load, prints a table of results, writes a record."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from els_client import _options as options
from els_client import _terminal as terminal
from els_client._bench_tables import show, show_sweep
from els_client._options import MODEL, TARGET, ModelName, Target
from els_client.bench import Plan, Sweep, run
from els_client.bench import sweep as run_sweep
from els_client.bench.plan import KINDS, Kind
from els_client.errors import InvalidArgumentError

_Value = TypeVar("_Value")
_LOAD, _ASKED, _LENGTH, _OUT = "Load", "Requests", "Duration", "Output"


def _parser(parse: Callable[[str], _Value], expected: str) -> Callable[[str], _Value]:
    """Return a parser whose error names the expected value."""

    def parsed(text: str) -> _Value:
        try:
            return parse(text)
        except ValueError:
            raise typer.BadParameter(f"expected {expected}, got {text!r}") from None

    return parsed


def _mix(text: str) -> dict[Kind, float]:
    given = dict(part.split("=") for part in text.split(","))
    if unknown := set(given) - set(KINDS):
        raise ValueError(unknown)
    return {kind: float(given[kind]) for kind in KINDS if kind in given}


def _range(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    return float(low), float(high or low)


def _rates(text: str) -> tuple[float, ...]:
    return () if text == "auto" else tuple(float(rate) for rate in text.split(","))


def bench(
    context: typer.Context,
    callers: Annotated[
        int | None,
        typer.Option(
            help="Closed loop: number of callers, each calls after each response; by default 8.",
            min=1,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Open loop: calls per second at random times, independent of responses;"
            " latency counts from the scheduled start of a call.",
            min=0.001,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="auto|R1,R2,…",
            help="Sweep: one caller, --callers (by default 16) for the ceiling, then open loops at"
            " these rates; auto: at shares of the ceiling.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Load processes.", min=1, rich_help_panel=_LOAD)
    ] = 1,
    connections: Annotated[
        int, typer.Option(help="Connections per process.", min=1, rich_help_panel=_LOAD)
    ] = 1,
    mix: Annotated[
        str,
        typer.Option(help="Weights: denoise=8,score=1,sample=1.", rich_help_panel=_ASKED),
    ] = "denoise=1",
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Denoise over DenoiseStream.", rich_help_panel=_ASKED),
    ] = False,
    images: Annotated[
        int, typer.Option(help="Images per call.", min=1, rich_help_panel=_ASKED)
    ] = 1,
    sigma: Annotated[
        str,
        typer.Option(
            help="Noise level σ, or LOW:HIGH, log-uniform between.", rich_help_panel=_ASKED
        ),
    ] = "0.1:10",
    label: Annotated[
        int | None, typer.Option(help="Label of all images.", rich_help_panel=_ASKED)
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Steps per sample.", min=1, rich_help_panel=_ASKED)
    ] = 20,
    priority: Annotated[
        int | None, typer.Option(help="Priority; 1 is the highest.", min=1, rich_help_panel=_ASKED)
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            help="Deadline in seconds, sent with the call.",
            min=0.001,
            rich_help_panel=_ASKED,
        ),
    ] = None,
    warm_up: Annotated[
        float, typer.Option(help="Warm-up in seconds.", min=0, rich_help_panel=_LENGTH)
    ] = 1.0,
    duration: Annotated[
        float, typer.Option(help="Measurement in seconds.", min=0.1, rich_help_panel=_LENGTH)
    ] = 10.0,
    count: Annotated[
        int | None,
        typer.Option(help="Maximum number of calls.", min=1, rich_help_panel=_LENGTH),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of times, kinds and pixels.", min=0, rich_help_panel=_LENGTH)
    ] = 0,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON record with time series.", rich_help_panel=_OUT),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Plots of the results.", rich_help_panel=_OUT),
    ] = None,
    target: Target = TARGET,
    model: ModelName = MODEL,
) -> None:
    """Generate load on a server and print latencies and rates.

    Latencies are of successful calls. Goodput counts responses before --deadline. The last lines
    show whether the load generator kept up: if it lagged or used a whole core, increase
    --processes. Requires the extra "bench".

    For example:

        els bench --callers 16 --duration 30

        els bench --rate 200 --deadline 1 --mix denoise=8,score=1,sample=1 --plot load.png

        els bench --sweep auto --mix sample=1 --json sweep.json --plot sweep.png
    """
    access: options.Access = context.obj
    default = 8 if sweep is None else 16
    with options.failures():
        rates = None if sweep is None else _parser(_rates, "auto or rates, like 5,10,20")(sweep)
        if rates is not None and rate is not None:
            raise InvalidArgumentError(f"rate: expected none with --sweep, got {rate}")
        plan = Plan(
            target=target,
            tls=access.tls,
            token=access.token,
            model=model,
            callers=default if callers is None and rate is None else callers,
            rate_per_s=rate,
            processes=processes,
            connections=connections,
            mix=_parser(_mix, f"weights of {', '.join(KINDS)}, like denoise=8,score=1")(mix),
            stream=stream,
            images=images,
            sigma=_parser(_range, "a number or LOW:HIGH")(sigma),
            label=label,
            steps=steps,
            priority=priority,
            deadline_s=deadline,
            warm_up_s=warm_up,
            duration_s=duration,
            count=count,
            seed=seed,
        )
        # Before the load, so that its results are not lost.
        for path in (json, plot):
            _check_file(path)
        # Extras, slow to import, and missing ones are better known before the load.
        with _extra():
            if plot:
                from els_client.bench.plot import check_suffix, draw, draw_sweep

                check_suffix(plot)
            if rates is None:
                with terminal.waiting(f"loading {plan.model} at {plan.target}"):
                    report = run(plan)
            else:
                swept = _sweep(plan, rates)
        if rates is None:
            show(report)
            if json:
                report.write(json)
            if plot:
                draw([report], plot)
            return
        show_sweep(swept)
        if json:
            swept.write(json)
        if plot:
            draw_sweep(swept, plot)


def _check_file(path: Path | None) -> None:
    """Check that a file can be written to a path.

    Raises:
        InvalidArgumentError: It cannot.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"{path}: expected an existing folder")
    if path.is_dir():
        raise InvalidArgumentError(f"{path}: expected a file, got a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidArgumentError(f"{path}: expected a file that can be written")


def _sweep(plan: Plan, rates: tuple[float, ...]) -> Sweep:
    with terminal.waiting(f"loading {plan.model} at {plan.target}") as status:
        return run_sweep(plan, rates, lambda text: status.update(f"loading {plan.model}: {text}"))


@contextmanager
def _extra() -> Iterator[None]:
    """Exit with code 1 and the name of the extra if a module is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        typer.echo(f"els: {error.name} is missing: pip install 'els-denoise[bench]'", err=True)
        raise typer.Exit(1) from None
