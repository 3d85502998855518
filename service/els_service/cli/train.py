"""``els-server train``: trains a network on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from els_service.cli.experiments import (
    Device,
    ExperimentCommand,
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
from els_service.denoisers.networks.config import ARCHITECTURES, NetworkConfig
from els_service.denoisers.networks.parametrisation import PREDICTIONS
from els_service.experiments.training import (
    RATES,
    Limits,
    TrainingSettings,
    load_training_data,
)
from els_service.experiments.training import train as run_training
from els_service.experiments.training.record import Row
from els_service.experiments.training.settings import PRECISIONS

_WIDTHS = {"resnet": (256,), "unet": (64, 128, 256), "unet-attention": (64, 128, 256)}
"""Default widths, those of the paper."""
_STORAGE = {"float32": torch.float32, "float16": torch.float16}

app = typer.Typer(rich_markup_mode=None)

Data = Annotated[
    list[Path],
    typer.Option(
        metavar="PATH",
        help="Banks, IDX files, folders of pictures, .npz or CIFAR-10 strips, concatenated.",
    ),
]
Out = Annotated[Path, typer.Option(metavar="MODEL_DIR", help="The model folder.")]
Resize = Annotated[
    str | None,
    typer.Option(metavar="HxW", help="Resize every image to HxW, or N for NxN."),
]
Limit = Annotated[
    int | None,
    typer.Option(
        parser=positive_integer("limit"),
        metavar="N",
        help="Maximum number of images of each data set, the first in file order.",
    ),
]
LabelNames = Annotated[str, typer.Option(metavar="A,B,…", help="One for each label.")]
Unconditional = Annotated[bool, typer.Option("--unconditional", help="Ignore labels.")]
Source = Annotated[str, typer.Option(help="Origin of the images, for the record.")]
Licence = Annotated[str, typer.Option(help="Licence of the images, for the record.")]
Architecture = Annotated[
    str,
    typer.Option(
        parser=one_of("arch", ARCHITECTURES), help=f"Architecture: {', '.join(ARCHITECTURES)}."
    ),
]
Widths = Annotated[
    str | None,
    typer.Option(
        metavar="W,…",
        help="Channels: one number for a resnet, one per resolution for a unet. "
        "[default: the paper's]",
    ),
]
Blocks = Annotated[int, typer.Option(help="Residual blocks of a resnet.")]
Padding = Annotated[
    str,
    typer.Option(
        parser=one_of("padding", ("zeros", "circular")),
        help="Padding of convolutions: zeros or circular.",
    ),
]
Prediction = Annotated[
    str,
    typer.Option(
        parser=one_of("prediction", PREDICTIONS),
        help=f"Prediction of the network: {', '.join(PREDICTIONS)}.",
    ),
]
SigmaData = Annotated[
    float,
    typer.Option(help="Standard deviation of the data, for edm."),
]
Epochs = Annotated[float, typer.Option(help="Passes over the data.")]
Batch = Annotated[int, typer.Option(help="Images per step.")]
Rate = Annotated[float, typer.Option(help="Maximum learning rate.")]
RateSchedule = Annotated[
    str,
    typer.Option(
        parser=one_of("rate-schedule", RATES),
        help=f"Schedule of the learning rate: {', '.join(RATES)}.",
    ),
]
WeightDecay = Annotated[float, typer.Option(help="Weight decay of AdamW.")]
Ema = Annotated[
    float,
    typer.Option(help="Decay of the moving average of weights; 0: none."),
]
LabelDropout = Annotated[
    float,
    typer.Option(
        help="Probability of dropping a label; above 0 the network also works without labels."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of weights, order and noise.")]
Precision = Annotated[
    str,
    typer.Option(
        parser=one_of("precision", PRECISIONS),
        help=f"Precision of the passes: {', '.join(PRECISIONS)}.",
    ),
]
ChannelsLast = Annotated[bool, typer.Option(help="Memory layout of images.")]
Compile = Annotated[bool, typer.Option(help="torch.compile the network.")]
Minutes = Annotated[
    float,
    typer.Option(parser=non_negative("minutes"), help="Pause after this time."),
]
CheckpointSeconds = Annotated[
    float,
    typer.Option(parser=non_negative("checkpoint-seconds"), help="Seconds between checkpoints."),
]
LogSteps = Annotated[
    int,
    typer.Option(parser=positive_integer("log-steps"), help="Steps per row of the log."),
]
Store = Annotated[
    str,
    typer.Option(
        parser=one_of("store", _STORAGE),
        help=f"Precision of the stored weights: {', '.join(_STORAGE)}.",
    ),
]


@app.command("train", cls=ExperimentCommand)
def train(
    context: typer.Context,
    data: Data,
    out: Out,
    resize: Resize = None,
    limit: Limit = None,
    label_names: LabelNames = "",
    unconditional: Unconditional = False,
    source: Source = "",
    licence: Licence = "",
    arch: Architecture = "resnet",
    widths: Widths = None,
    blocks: Blocks = 6,
    padding: Padding = "zeros",
    prediction: Prediction = "eps",
    sigma_data: SigmaData = 0.5,
    epochs: Epochs = TrainingSettings.epochs,
    batch: Batch = TrainingSettings.batch,
    lr: Rate = TrainingSettings.rate,
    rate_schedule: RateSchedule = "decay",
    weight_decay: WeightDecay = TrainingSettings.weight_decay,
    ema: Ema = 0.0,
    label_dropout: LabelDropout = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
    precision: Precision = "float32",
    channels_last: ChannelsLast = True,
    compile: Compile = False,
    minutes: Minutes = float("inf"),
    checkpoint_seconds: CheckpointSeconds = 30.0,
    log_steps: LogSteps = 50,
    store: Store = "float32",
) -> None:
    """Train a network on a data set; writes a servable model folder.

    The same command resumes a paused or interrupted run.
    """
    size = None if resize is None else _size(resize)
    channels = positive_integers("widths", widths) or _WIDTHS[arch]
    torch_device = prepare_device(device, threads)
    limits = Limits(seconds=60 * minutes, checkpoint_s=checkpoint_seconds, log_steps=log_steps)
    bank = load_training_data(
        data,
        resize=size,
        limit=limit,
        label_names=words(label_names),
        source=source,
        licence=licence,
        labelled=not unconditional,
    )
    network = NetworkConfig(
        architecture=arch,
        shape=bank.shape,
        widths=channels,
        blocks=blocks,
        padding=padding,
        label_count=0 if unconditional else bank.label_count,
        label_names=() if unconditional else bank.label_names,
        null_label=label_dropout > 0,
        prediction=prediction,
        sigma_data=sigma_data,
    )
    settings = TrainingSettings(
        network=network,
        epochs=epochs,
        batch=batch,
        rate=lr,
        schedule=rate_schedule,
        weight_decay=weight_decay,
        ema=ema,
        label_dropout=label_dropout,
        seed=seed,
        precision=precision,
        channels_last=channels_last,
        compile=compile,
    )
    with _reporting() as report:
        outcome = run_training(
            settings,
            bank,
            out,
            device=torch_device,
            limits=limits,
            command=command_line(context),
            storage=_STORAGE[store],
            report=report,
        )
    state = "finished" if outcome.finished else "paused: the same command resumes it"
    print(f"step {outcome.step} of {outcome.steps}, loss {outcome.loss:.4g}: {state}")


@contextmanager
def _reporting() -> Iterator[Callable[[Row, int], None]]:
    with Progress("train", every_s=0.0) as progress:  # --log-steps sets how often rows come
        yield lambda row, steps: progress(
            row.step, steps, f"step {row.step}/{steps}  loss {row.loss:.4f}"
        )


def _size(text: str) -> tuple[int, int]:
    height, *width = map(positive_integer("resize"), text.lower().split("x", 1))
    return height, width[0] if width else height
