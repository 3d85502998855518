"""The command ``els``: models, denoise, score and sample, and the commands of other modules."""

from __future__ import annotations

import time as clock
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from els_client import _options as options
from els_client import _pictures as pictures
from els_client import _terminal as terminal
from els_client._bench_command import bench
from els_client._explain_command import explain
from els_client._operator_commands import log_level, repository
from els_client._options import MODEL, TARGET, AsJson, ModelName, Target, Timeout
from els_client._originality_command import originality
from els_client._picture_options import (
    AlphaBar,
    Label,
    Resize,
    Sigma,
    Size,
    Source,
    Steps,
    Time,
    Window,
    read,
    shape_of,
)
from els_client._remix_command import remix
from els_client._sweep_command import sweep
from els_client._types import Images, Sampler, Timesteps, Want
from els_client.errors import InvalidArgumentError
from els_proto.build_info import COMMIT

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=options.EXIT_CODES_HELP,
)


def main() -> None:
    """Run the command line."""
    app()


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"els {metadata.version('els-denoise')} ({COMMIT})")
        raise typer.Exit


_PEM = {"metavar": "PEM", "exists": True, "dir_okay": False}
_NPY = {"metavar": "NPY", "exists": True, "dir_okay": False}


@app.callback()
def _els(
    context: typer.Context,
    target: Annotated[
        str, typer.Option(help="Address of the server.", metavar="HOST:PORT", envvar="ELS_TARGET")
    ] = TARGET,
    model: ModelName = MODEL,
    timeout: Timeout = None,
    as_json: AsJson = False,
    tls: Annotated[
        bool, typer.Option("--tls", help="Use TLS; implied by the next three.", envvar="ELS_TLS")
    ] = False,
    ca: Annotated[
        Path | None,
        typer.Option(help="Certificate authorities of the server.", envvar="ELS_CA", **_PEM),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Own certificate.", envvar="ELS_CERTIFICATE", **_PEM)
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Client's private key.", envvar="ELS_KEY", **_PEM)
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File that holds the bearer token.", envvar="ELS_TOKEN_FILE", exists=True
        ),
    ] = None,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Client of a denoising server.

    The options --target, --model, --timeout and --json may also follow the command.
    """
    with options.failures():
        context.obj = options.access(
            encrypted=tls, ca=ca, certificate=certificate, key=key, token_file=token_file
        )
    shared = {"target": target, "model": model, "timeout": timeout, "as_json": as_json}
    commands = (
        *("models", "denoise", "score", "sample", "explain", "originality", "sweep"),
        *("bench", "log-level"),
    )
    # Without a target it starts a server, and without a model it takes the only one.
    chosen = {name: value for name, value in shared.items() if _is_given(context, name)}
    nested = {"repository": dict.fromkeys(("index", "load", "unload"), shared)}
    context.default_map = {**dict.fromkeys(commands, shared), "remix": chosen, **nested}


def _is_given(context: typer.Context, name: str) -> bool:
    """Return whether an option is on the command line or in the environment."""
    source = context.get_parameter_source(name)
    # By name: versions of typer bring the class from different packages.
    return source is not None and source.name != "DEFAULT"


app.command()(explain)
app.command()(originality)
app.command()(sweep)
app.command()(bench)
app.command()(remix)
app.add_typer(repository, name="repository")
app.command("log-level")(log_level)


@app.command()
def models(
    context: typer.Context,
    target: Target = TARGET,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """List the served models."""
    with options.connected(context, target, timeout) as client:
        terminal.list_models(client.models(), as_json)


@app.command()
def denoise(
    context: typer.Context,
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT.png", show_default=False)],
    sigma: Sigma = None,
    alpha_bar: AlphaBar = None,
    time: Time = None,
    label: Label = None,
    window: Window = None,
    resize: Resize = False,
    target: Target = TARGET,
    model: ModelName = MODEL,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Denoise a picture: write the posterior mean of a noisy one.

    The picture, a BMP, GIF, JPEG, PNG, PPM, TIFF or WebP of 8 bits a channel, is mapped to [-1, 1],
    and the noise level is in those units; no noise is added. It is rotated by its EXIF orientation;
    animations, transparency and pictures of more than 67 million pixels are rejected.
    """
    began = clock.perf_counter()
    level: dict[str, Any] = {"sigma": sigma, "alpha_bar": alpha_bar, "time": time}
    with (
        options.connected(context, target, timeout) as client,
        terminal.waiting(f"calling {model}"),
    ):
        pictures.check_target(out)
        served = client.model(model)
        x = read(source, served, resize=resize)
        answer = client.denoise(x, model=model, **level, label=label, window=window)
        pictures.write(out, answer[0])
    terminal.report(as_json, began, out, model=model)


@app.command()
def score(
    context: typer.Context,
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT.png|OUT.npy", show_default=False)],
    sigma: Sigma = None,
    alpha_bar: AlphaBar = None,
    time: Time = None,
    label: Label = None,
    window: Window = None,
    resize: Resize = False,
    target: Target = TARGET,
    model: ModelName = MODEL,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Write the score of a noisy picture, the gradient of its log density.

    In a picture 0 is mid-grey and the largest magnitude is black or white; .npy has the values,
    float32 [1, C, H, W] in 1/pixel. The picture is read as in denoise.
    """
    began = clock.perf_counter()
    level: dict[str, Any] = {"sigma": sigma, "alpha_bar": alpha_bar, "time": time}
    with (
        options.connected(context, target, timeout) as client,
        terminal.waiting(f"calling {model}"),
    ):
        pictures.check_target(out, also=".npy")
        served = client.model(model)
        x = read(source, served, resize=resize)
        answer = client.score(x, model=model, **level, label=label, window=window)
        pictures.write_score(out, answer)
    terminal.report(as_json, began, out, model=model, largest=float(abs(answer).max()))


@app.command()
def sample(
    context: typer.Context,
    picture: Annotated[
        Path | None, typer.Argument(metavar="[OUT.png]", help="As --out.", show_default=False)
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="Number of images; by default one, or one for each --label.", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Noise of image i: (seed, i).", min=0)] = 0,
    label: Annotated[
        list[str] | None,
        typer.Option(help="One for all or one each: repeat it, or use commas.", metavar="N"),
    ] = None,
    size: Size = None,
    steps: Steps = None,
    sampler: Annotated[Sampler, typer.Option(help="Sampler.")] = "ddim",
    eta: Annotated[
        float | None, typer.Option(help="Noise of each ddpm step, 0 to 1; by default 1.")
    ] = None,
    churn: Annotated[float, typer.Option(help="Total noise of heun and euler, S_churn.")] = 0.0,
    churn_min: Annotated[float | None, typer.Option(help="Lowest churned σ, S_min.")] = None,
    churn_max: Annotated[float | None, typer.Option(help="Highest churned σ, S_max.")] = None,
    churn_noise: Annotated[float | None, typer.Option(help="Scale of its noise, S_noise.")] = None,
    timesteps: Annotated[
        Timesteps | None, typer.Option(help="Steps of a diffusers folder's scheduler, or aligned.")
    ] = None,
    times: Annotated[
        str | None, typer.Option(help="Times instead of steps: 1,0.6,0.3.", metavar="T,…")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Picture to start from.", exists=True, dir_okay=False)
    ] = None,
    start_time: Annotated[
        float | None, typer.Option(help="Time to which it is noised, up to 1.")
    ] = None,
    resize: Resize = False,
    first_image: Annotated[int, typer.Option(help="First image of the seed.", min=0)] = 0,
    conditioning: Annotated[
        Path | None, typer.Option(help="Condition of a latent model, [1 or N, T, W].", **_NPY)
    ] = None,
    unconditional: Annotated[
        Path | None, typer.Option(help="Condition of an empty text, for guidance.", **_NPY)
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance strength; by default 1.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Picture of the images to write; by default grid.png.")
    ] = None,
    gif: Annotated[Path | None, typer.Option(help="GIF of the trajectory to write.")] = None,
    target: Target = TARGET,
    model: ModelName = MODEL,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Sample images and write them as one grid; those of a latent model are decoded."""
    began = clock.perf_counter()
    states: list[Images] = []
    with options.connected(context, target, timeout) as client, terminal.progress() as progress:
        if picture and out:
            raise InvalidArgumentError(f"out: expected one name, got {picture} and {out}")
        out = picture or out or Path("grid.png")
        if gif and gif.suffix.lower() != ".gif":
            raise InvalidArgumentError(f"gif: expected a name that ends in .gif, got {gif}")
        for path in (out, gif):
            pictures.check_target(path)
        labels = _integers(label)
        count = count or len(labels) or 1
        given = None if conditioning is None else pictures.read_numbers(conditioning)
        without = None if unconditional is None else pictures.read_numbers(unconditional)
        served = client.model(model)
        shape = shape_of(size, served)
        decoded = served.decoded_shape is not None
        pictures.check_channels((served.decoded_shape or served.shape)[0])
        if decoded and gif:
            raise InvalidArgumentError("gif: expected none, as steps of a latent model are latents")
        want: set[Want] = {"decoded"} if decoded else {"x"} if gif else set()
        bar = progress.add_task(f"{model}: {count} samples", total=steps)
        begin = None
        if start is not None:
            begin = pictures.read(start, shape, resize=resize)
        for step in client.sample(
            model=model,
            count=count,
            seed=seed,
            size=None if size is None else shape[1:],
            steps=steps,
            sampler=sampler,
            label=labels,
            eta=eta,
            churn=churn,
            want=want,
            conditioning=given,
            unconditional=without,
            guidance=guidance,
            timesteps=timesteps,
            times=_numbers("times", times),
            start=begin,
            start_time=start_time,
            first_image=first_image,
            churn_min_sigma=churn_min,
            churn_max_sigma=churn_max,
            churn_noise=churn_noise,
        ):
            progress.update(bar, completed=step.index, total=step.total)
            if gif or step.index == step.total:
                states.append(step.decoded if decoded else step.x)
        pictures.write_grid(out, states[-1])
        if gif:
            pictures.write_gif(gif, states)
    terminal.report(as_json, began, out, gif, model=model, count=count, seed=seed)


def _integers(texts: list[str] | None) -> list[int]:
    """Return the labels of ``--label 1,2 --label 3``."""
    try:
        return [int(label) for text in texts or () for label in text.split(",")]
    except ValueError:
        raise InvalidArgumentError(
            f"label: expected integers, got {','.join(texts or ())}"
        ) from None


def _numbers(field: str, text: str | None) -> list[float] | None:
    """Return the numbers of ``1,0.6,0.3``."""
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise InvalidArgumentError(f"{field}: expected numbers, got {text}") from None
