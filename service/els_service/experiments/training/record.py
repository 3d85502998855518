"""Log of a training run: CSV rows, a plot of the loss, and the record in the model folder."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from els_service.denoisers.files import write_atomically

LOG_FILE = "loss.csv"
PLOT_FILE = "loss.png"
_HEADER = ("step", "epoch", "loss", "rate", "seconds")
_SIZE, _MARGIN, _INK = (640, 360), 40, "#1f4e9c"


@dataclass(frozen=True)
class Row:
    """One row of the log; the loss is the mean since the previous row."""

    step: int
    epoch: float
    loss: float
    rate: float
    seconds: float


def read_log(folder: Path, last_step: int) -> list[Row]:
    """Return the rows up to a step; later rows are of steps after the checkpoint."""
    path = folder / LOG_FILE
    if not path.exists():
        return []
    # A killed run may leave an incomplete last row, cut at any byte.
    lines = path.read_bytes().decode(errors="replace").split("\n")[1:-1]
    rows = (row for line in lines if (row := _parsed(line)))
    return [row for row in rows if row.step <= last_step]


def _parsed(line: str) -> Row | None:
    """Return a row of the log, or None if the line is invalid."""
    step, *others = line.split(",")
    try:
        return Row(int(step), *map(float, others))
    except (ValueError, TypeError):
        return None


def write_log(folder: Path, rows: Sequence[Row]) -> None:
    """Write all rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADER)
    writer.writerows(_fields(row) for row in rows)
    write_atomically(folder / LOG_FILE, text.getvalue().encode())


def append_log(folder: Path, row: Row) -> None:
    """Add a row."""
    with (folder / LOG_FILE).open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(_fields(row))


def _fields(row: Row) -> tuple[str, ...]:
    numbers = (f"{row.epoch:.4f}", f"{row.loss:.6g}", f"{row.rate:.6g}", f"{row.seconds:.1f}")
    return (str(row.step), *numbers)


def plot_loss(folder: Path, rows: Sequence[Row]) -> None:
    """Plot the loss over steps, with a logarithmic loss axis."""
    rows = [row for row in rows if row.loss > 0]
    if not rows:
        return
    logs = [math.log(row.loss) for row in rows]
    low, high = min(logs), max(logs)
    width, height = _SIZE[0] - 2 * _MARGIN, _SIZE[1] - 2 * _MARGIN
    points = [
        (
            _MARGIN + width * row.step / rows[-1].step,
            _MARGIN + height * (high - value) / max(high - low, 1e-9),
        )
        for row, value in zip(rows, logs, strict=True)
    ]
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((_MARGIN, _MARGIN, _MARGIN + width, _MARGIN + height), outline="grey")
    draw.line(points, fill=_INK, width=2)
    # A single row makes no line.
    x, y = points[-1]
    draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_INK)
    draw.text((4, _MARGIN - 6), f"{math.exp(high):.3g}", fill="black")
    draw.text((4, _MARGIN + height - 6), f"{math.exp(low):.3g}", fill="black")
    draw.text((_MARGIN, _SIZE[1] - 30), "loss over steps", fill="black")
    draw.text((_SIZE[0] - 2 * _MARGIN, _SIZE[1] - 30), str(rows[-1].step), fill="black")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(folder / PLOT_FILE, buffer.getvalue())
