"""Command-line helpers of `train`, `calibrate` and `compare`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable

import torch

from els_service.denoisers.files import check_temporary_folder
from els_service.errors import ElsError, InvalidArgumentError

_REFUSED, _INTERRUPTED = 2, 130
_WIDTH = 12


def positive(field: str) -> Callable[[str], int]:
    """Return a parser of whole numbers above 0."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            message = f"{field}: expected a whole number above 0, got {text}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return parse


def amount(field: str) -> Callable[[str], float]:
    """Return a parser of numbers from 0 to infinity."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not number >= 0:
            message = f"{field}: expected a number, 0 or more, got {text}"
            raise argparse.ArgumentTypeError(message)
        return number

    return parse


def listed(field: str) -> Callable[[str], tuple[int, ...]]:
    """Return a parser of whole numbers above 0, separated by commas."""
    number = positive(field)
    return lambda text: tuple(number(part) for part in text.split(","))


def prepared_device(options: argparse.Namespace) -> str:
    """Set the number of threads and return the device.

    Raises:
        InvalidArgumentError: There is no GPU, or the number of threads is negative.
    """
    if options.threads < 0:
        raise InvalidArgumentError("threads", "0 or more", options.threads)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    name: str = options.device
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError("device", "cpu, as torch sees no GPU", name)
    return name


def refusing(program: str, work: Callable[[], None]) -> int:
    """Run ``work``; return its exit code: 0, 2 for invalid input, 130 for Ctrl-C (on stderr)."""
    try:
        check_temporary_folder()
        work()
    except (ElsError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt:
        print(f"{program}: interrupted: the same command resumes it", file=sys.stderr)
        return _INTERRUPTED
    return 0


class Progress:
    """Progress of a long run on stderr: a bar on a terminal, otherwise a line now and then.

    Args:
        title: name of the work.
        quiet_s: seconds between two lines if stderr is not a terminal.
    """

    def __init__(self, title: str, quiet_s: float = 10.0) -> None:
        self._title, self._quiet_s = title, quiet_s
        self._begin, self._shown, self._first = time.monotonic(), -quiet_s, -1
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` steps are complete, with a note."""
        now = time.monotonic()
        if self._first < 0:
            # Steps of an earlier run do not count for the speed of this one.
            self._first, self._begin = done, now
        if not self._terminal and done < total and now - self._shown < self._quiet_s:
            return
        self._shown = now
        filled = _WIDTH * done // total
        bar = "█" * filled + "·" * (_WIDTH - filled)
        text = f"{self._title:<12} {bar} {100 * done // total:3d} %  {note}"
        text = f"{text}  {self._left(done, total, now)}"
        end = "\r" if self._terminal and done < total else "\n"
        print(f"{text:<78}", end=end, file=sys.stderr, flush=True)

    def _left(self, done: int, total: int, now: float) -> str:
        if done <= self._first or done == total:
            return ""
        return f"{(now - self._begin) / (done - self._first) * (total - done) / 60:.1f} min left"
