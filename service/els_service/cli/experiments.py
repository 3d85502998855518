"""Options, parsers and errors shared by ``train``, ``calibrate`` and ``compare``."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperCommand

from els_service.denoisers.files import check_temporary_folder
from els_service.errors import ElsError, InvalidArgumentError

_INVALID, _INTERRUPTED = 2, 130
_ARGUMENTS = "els_service.arguments"


class ExperimentCommand(TyperCommand):
    """A command whose errors are one line on stderr.

    Exit codes: 0, 2 for invalid input, 130 for Ctrl-C.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, and store them for ``command_line``."""
        ctx.meta[_ARGUMENTS] = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            # typer's box breaks long lines.
            self._fail(error.format_message())
            raise typer.Exit(_INVALID) from error

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            check_temporary_folder()
            return super().invoke(ctx)
        except typer.BadParameter as error:
            self._fail(error.format_message())
            raise typer.Exit(_INVALID) from error
        except (ElsError, OSError) as error:
            self._fail(str(error))
            raise typer.Exit(_INVALID) from error
        except KeyboardInterrupt as error:
            self._fail("interrupted: the same command resumes it")
            raise typer.Exit(_INTERRUPTED) from error

    def _fail(self, text: str) -> None:
        print(f"els-server {self.name}: {' '.join(text.split())}", file=sys.stderr)


def command_line(context: typer.Context) -> str:
    """Return the command as entered, for records."""
    return shlex.join(["els-server", str(context.command.name), *context.meta[_ARGUMENTS]])


def positive_integer(field: str) -> Callable[[str], int]:
    """Return a parser of positive integers."""

    def parse(value: object) -> int:
        text = str(value)
        if not text.isdecimal() or int(text) < 1:
            raise typer.BadParameter(f"{field}: expected a whole number above 0, got {text}")
        return int(text)

    return parse


def non_negative(field: str) -> Callable[[str], float]:
    """Return a parser of numbers from 0 to infinity."""

    def parse(value: object) -> float:
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not number >= 0:
            raise typer.BadParameter(f"{field}: expected a number, 0 or more, got {value}")
        return number

    return parse


def one_of(field: str, values: Iterable[str]) -> Callable[[str], str]:
    """Return a parser that accepts one of several words."""
    known = tuple(values)

    def parse(value: str) -> str:
        if value not in known:
            expected = f"one of {', '.join(known)}"
            raise typer.BadParameter(f"{field}: expected {expected}, got {value}")
        return value

    return parse


def positive_integers(field: str, text: str | None) -> tuple[int, ...] | None:
    """Return comma-separated positive integers; None for None."""
    return None if text is None else tuple(map(positive_integer(field), text.split(",")))


def words(text: str) -> tuple[str, ...]:
    """Return comma-separated words; none for an empty text."""
    return tuple(word.strip() for word in text.split(",")) if text else ()


DEVICES = ("auto", "cpu", "cuda")
Device = Annotated[str, typer.Option(parser=one_of("device", DEVICES), help="auto, cpu or cuda.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: torch's default.")]
Bank = Annotated[
    Path,
    typer.Option(
        metavar="FILE", help="Images of the machines: a bank, or a data set as for `train`."
    ),
]
BankLimit = Annotated[
    int | None,
    typer.Option(
        parser=positive_integer("bank-limit"),
        metavar="N",
        help="Maximum number of images, evenly from all labels, the first of each.",
    ),
]
Models = Annotated[Path | None, typer.Option(help="Folder of models. [default: the bundled ones]")]


def prepare_device(device: str, threads: int) -> str:
    """Set the number of threads and return the device, ``cpu`` or ``cuda``.

    Raises:
        InvalidArgumentError: There is no GPU, or the number of threads is negative.
    """
    if threads < 0:
        raise InvalidArgumentError("threads", "0 or more", threads)
    torch.set_num_threads(threads or torch.get_num_threads())
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError("device", "cpu, as torch sees no GPU", device)
    return device
