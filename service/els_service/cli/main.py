"""``els-server run | probe | check | bank | picture | train | calibrate | compare | token``."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from els_service.cli import bank, calibrate, compare, picture, probe, train
from els_service.cli.token import token
from els_service.config import Settings, load_settings, unknown_variables
from els_service.denoisers.files import check_temporary_folder
from els_service.errors import LoadError
from els_service.version import COMMIT, VERSION

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve denoisers over gRPC.",
    rich_markup_mode=None,  # which removes "[default: …]"
)
app.add_typer(probe.app)
app.add_typer(bank.app, name="bank")
app.add_typer(picture.app, name="picture")
app.add_typer(train.app)
app.add_typer(calibrate.app)
app.add_typer(compare.app)
app.command()(token)

_FAULT = 2
_DEVICE_LOST = 3

Models = Annotated[Path | None, typer.Option(help="Folder of models; replaces the bundled ones.")]
Host = Annotated[
    str | None, typer.Option(help="Address to bind, or unix:PATH. [default: 127.0.0.1]")
]
Port = Annotated[int | None, typer.Option(help="gRPC port; 0 takes any free. [default: 50051]")]
MetricsPort = Annotated[
    int | None, typer.Option(help="Port of /metrics; 0 takes any free. [default: 9090]")
]
HttpPort = Annotated[
    int | None,
    typer.Option(help="Port of HTTP, 0 takes any free. [default: none]"),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda. [default: auto]")]
Threads = Annotated[
    int | None, typer.Option(help="Threads of one computation. [default: the CPU limit]")
]
LogLevel = Annotated[
    str | None, typer.Option(help="debug, info, warning or error. [default: info]")
]
TlsCertificate = Annotated[Path | None, typer.Option(help="PEM file; with --tls-key serves TLS.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM file of the certificate's private key.")]
Tokens = Annotated[Path | None, typer.Option(help="YAML file of tokens; see els-server token.")]
Insecure = Annotated[
    bool | None,
    typer.Option(help="Allow plaintext beyond loopback, such as behind a proxy."),
]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings. [env: ELS_CONFIG]")]


@app.callback(invoke_without_command=True)
def _global(
    version: Annotated[bool, typer.Option("--version", help="Print version and commit.")] = False,
) -> None:
    if version:
        typer.echo(f"els-server {VERSION} ({COMMIT})")
        raise typer.Exit


@app.command()
def run(
    models: Models = None,
    host: Host = None,
    port: Port = None,
    metrics_port: MetricsPort = None,
    http_port: HttpPort = None,
    device: Device = None,
    threads: Threads = None,
    log_level: LogLevel = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    tokens: Tokens = None,
    insecure: Insecure = None,
    config: Config = None,
) -> None:
    """Serve until SIGTERM; prints one line of JSON when ready, logs to stderr.

    If no model can be loaded, the line says so, and health is NOT_SERVING until one is loaded.
    Exit codes: 0 after a drain, 2 if the server cannot start, 3 if a device hangs or fails.

    Precedence: flag, ELS_… variable, YAML file, default.
    """
    settings = _settings(locals())
    try:
        check_temporary_folder()
    except LoadError as error:
        raise _refused(error) from error
    from els_service.logs import configure

    # First: gRPC reads its logging configuration at import.
    configure(settings.log_level)
    import uvloop

    from els_service.engine.device import DeviceLostError
    from els_service.server.server import Started, serve

    def ready(started: Started) -> None:
        ports = {
            name: port
            for name, port in asdict(started).items()
            if name.endswith("_port") and port is not None
        }
        event = {"event": "ready" if started.ready else "no model is served", **ports}
        print(json.dumps(event), flush=True)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, ready))
    except LoadError as error:
        raise _refused(error) from error
    except DeviceLostError as error:
        print(f"els-server: {error}", file=sys.stderr, flush=True)
        # Not sys.exit, which would wait for a thread that hangs on the device.
        os._exit(_DEVICE_LOST)
    finally:
        # The event loop's handlers are gone: a second signal would exit with its own code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@app.command()
def check(
    models: Models = None,
    host: Host = None,
    port: Port = None,
    metrics_port: MetricsPort = None,
    http_port: HttpPort = None,
    device: Device = None,
    threads: Threads = None,
    log_level: LogLevel = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    tokens: Tokens = None,
    insecure: Insecure = None,
    config: Config = None,
    config_only: Annotated[bool, typer.Option(help="Check only the configuration.")] = False,
    strict: Annotated[bool, typer.Option(help="Reject unknown ELS_… variables.")] = False,
) -> None:
    """Check configuration and model folders; exits with 2 and names each fault.

    For each model it prints the time of a step on this machine and of a sample of 20 steps: the
    model's estimate, corrected by a measurement of a tenth of a second.
    """
    flags = dict(locals())
    del flags["config_only"], flags["strict"]
    settings = _settings(flags)
    from els_service.server.preflight import check_settings

    try:
        check_settings(settings)
        if strict and (unknown := unknown_variables(os.environ)):
            raise LoadError(", ".join(unknown), "expected names of settings, got others")
    except LoadError as error:
        raise _refused(error) from error
    typer.echo("configuration: ok")
    if not config_only:
        faults = _check_models(settings)
        if faults:
            raise typer.Exit(_FAULT)


def _check_models(settings: Settings) -> int:
    """Load and run every model, print its state, and return the number of invalid ones."""
    import torch

    from els_service.cli.speed import (
        describe_engine,
        describe_sizes,
        describe_speed,
        describe_windows,
    )
    from els_service.config import cpu_limit
    from els_service.engine.device import choose_devices
    from els_service.server.server import repository

    torch.set_num_threads(settings.threads or cpu_limit())
    device = choose_devices(settings.device)[0]
    faults = 0
    try:
        models = repository(settings)
        names = models.names()
    except LoadError as error:
        raise _refused(error) from error
    for name in names:
        try:
            for version in models.versions(name):
                denoiser = models.load(name, version, device)
                info = denoiser.info
                label = name if version == 1 else f"{name} version {version}"
                kind = f"{info.kind} {info.machine}".rstrip()
                also = f"{describe_sizes(info)}{describe_windows(info)}{describe_engine(info)}"
                typer.echo(f"{label}: ok, {kind}; {describe_speed(denoiser)}{also}")
        except LoadError as error:
            faults += 1
            typer.echo(f"{name}: {error}", err=True)
    if not names:
        typer.echo(f"{models.root}: expected a folder NAME/model.yaml, found none", err=True)
    return faults or not names


def _settings(flags: dict[str, Any]) -> Settings:
    try:
        return load_settings(**flags)
    except LoadError as error:
        raise _refused(error) from error


def _refused(error: LoadError) -> typer.Exit:
    print(f"els-server: {error}", file=sys.stderr)
    return typer.Exit(_FAULT)
