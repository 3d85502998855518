"""Train a network from the command line: ``python -m els_service.experiments.train``.

Requires only torch, numpy, safetensors, PyYAML and Pillow.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from els_service.denoisers.banks import Bank
from els_service.denoisers.networks.config import ARCHITECTURES, NetworkConfig
from els_service.denoisers.networks.parametrisation import PREDICTIONS
from els_service.experiments.command_line import (
    Progress,
    amount,
    listed,
    positive,
    prepared_device,
    refusing,
)
from els_service.experiments.training import (
    RATES,
    Limits,
    TrainingSettings,
    load_training_data,
    train,
)
from els_service.experiments.training.record import Row
from els_service.experiments.training.settings import PRECISIONS

_WIDTHS = {"resnet": (256,), "unet": (64, 128, 256), "unet-attention": (64, 128, 256)}
"""Default widths, those of the paper."""
_STORAGE = {"float32": torch.float32, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run a training; return the exit code: 0, 2 for invalid input, 130 for Ctrl-C.

    Args:
        arguments: without the program's name; None for sys.argv.
        program: name of the command in the help and the record.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(program or "python -m els_service.experiments.train")
    options = parser.parse_args(arguments)
    command = shlex.join([*parser.prog.split(), *arguments])
    return refusing(parser.prog, lambda: _train(options, command))


def _train(options: argparse.Namespace, command: str) -> None:
    device = prepared_device(options)
    limits = Limits(
        seconds=60 * options.minutes,
        checkpoint_s=options.checkpoint_seconds,
        log_steps=options.log_steps,
    )
    bank = load_training_data(
        options.data,
        resize=options.resize,
        limit=options.limit,
        label_names=options.label_names,
        source=options.source,
        licence=options.licence,
        labelled=not options.unconditional,
    )
    outcome = train(
        _settings(options, bank),
        bank,
        options.out,
        device=device,
        limits=limits,
        command=command,
        storage=_STORAGE[options.store],
        report=_reporter(),
    )
    state = "finished" if outcome.finished else "paused: the same command resumes it"
    print(f"step {outcome.step} of {outcome.steps}, loss {outcome.loss:.4g}: {state}")


def _settings(options: argparse.Namespace, bank: Bank) -> TrainingSettings:
    labelled = not options.unconditional
    network = NetworkConfig(
        architecture=options.arch,
        shape=bank.shape,
        widths=options.widths or _WIDTHS[options.arch],
        blocks=options.blocks,
        padding=options.padding,
        label_count=bank.label_count if labelled else 0,
        label_names=bank.label_names if labelled else (),
        null_label=options.label_dropout > 0,
        prediction=options.prediction,
        sigma_data=options.sigma_data,
    )
    return TrainingSettings(
        network=network,
        epochs=options.epochs,
        batch=options.batch,
        rate=options.lr,
        schedule=options.rate_schedule,
        weight_decay=options.weight_decay,
        ema=options.ema,
        label_dropout=options.label_dropout,
        seed=options.seed,
        precision=options.precision,
        channels_last=options.channels_last,
        compile=options.compile,
    )


def _reporter() -> Callable[[Row, int], None]:
    progress = Progress("train", quiet_s=0.0)  # --log-steps sets how often rows come
    return lambda row, steps: progress(
        row.step, steps, f"step {row.step}/{steps}  loss {row.loss:.4f}"
    )


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program,
        description="Train a denoising network; writes a servable model folder. "
        "The same command resumes a paused or interrupted run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_data(parser)
    _add_network(parser)
    _add_training(parser)
    _add_machine(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        action="append",
        required=True,
        metavar="PATH",
        help="banks, IDX files, folders of pictures, .npz or CIFAR-10 strips, concatenated",
    )
    add("--out", type=Path, required=True, metavar="MODEL_DIR", help="the model folder")
    add("--resize", type=_size, metavar="HxW", help="resize every image to HxW, or N for NxN")
    add(
        "--limit",
        type=positive("limit"),
        metavar="N",
        help="maximum number of images of each data set, the first in file order",
    )
    add("--label-names", type=_names, default=(), metavar="A,B,…", help="one for each label")
    add("--unconditional", action="store_true", help="ignore labels")
    add("--source", default="", help="origin of the images, for the record")
    add("--licence", default="", help="licence of the images, for the record")


def _add_network(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--arch", choices=ARCHITECTURES, default="resnet", help="architecture")
    add(
        "--widths",
        type=listed("widths"),
        metavar="W,…",
        help="channels: one number for a resnet, one per resolution for a unet (default: paper)",
    )
    add("--blocks", type=int, default=6, help="residual blocks of a resnet")
    add("--padding", choices=("zeros", "circular"), default="zeros", help="of convolutions")
    add("--prediction", choices=PREDICTIONS, default="eps", help="prediction of the network")
    add("--sigma-data", type=float, default=0.5, help="for edm: standard deviation of the data")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--epochs", type=float, default=TrainingSettings.epochs, help="passes over the data")
    add("--batch", type=int, default=TrainingSettings.batch, help="images per step")
    add("--lr", type=float, default=TrainingSettings.rate, help="maximum learning rate")
    add("--rate-schedule", choices=RATES, default="decay", help="schedule of the learning rate")
    add("--weight-decay", type=float, default=TrainingSettings.weight_decay, help="of AdamW")
    add("--ema", type=float, default=0.0, help="decay of the moving average of weights, 0: none")
    add(
        "--label-dropout",
        type=float,
        default=0.0,
        help="probability of dropping a label; above 0 the network also works without labels",
    )
    add("--seed", type=int, default=0, help="seed of weights, order and noise")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    flag = argparse.BooleanOptionalAction
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to train on")
    add("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    add("--precision", choices=PRECISIONS, default="float32", help="precision of the passes")
    add("--channels-last", action=flag, default=True, help="memory layout of images")
    add("--compile", action=flag, default=False, help="torch.compile the network")
    add(
        "--minutes",
        type=amount("minutes"),
        default=float("inf"),
        help="pause after this time",
    )
    seconds = amount("checkpoint-seconds")
    add("--checkpoint-seconds", type=seconds, default=30.0, help="between checkpoints")
    add("--log-steps", type=positive("log-steps"), default=50, help="steps per row of the log")
    add("--store", choices=_STORAGE, default="float32", help="precision of the stored weights")


def _size(text: str) -> tuple[int, int]:
    height, *width = map(positive("resize"), text.lower().split("x", 1))
    return height, width[0] if width else height


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
