"""Training settings: everything other than the data that determines the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from els_service.denoisers.networks.config import NetworkConfig
from els_service.errors import InvalidArgumentError

PRECISIONS = ("float32", "tf32", "bfloat16")
_DECAY = 0.999965
"""Decay of the learning rate per step in the paper."""
_WARM_UP = 0.3
_START, _END = 1 / 25, 1e-4
"""Ends of the one-cycle schedule, relative to its peak."""


def _constant(progress: float, step: int) -> float:
    return 1.0


def _decayed(progress: float, step: int) -> float:
    return float(_DECAY**step)


def _one_cycle(progress: float, step: int) -> float:
    if progress < _WARM_UP:
        return _between(_START, 1.0, progress / _WARM_UP)
    return _between(1.0, _END, (progress - _WARM_UP) / (1 - _WARM_UP))


def _between(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


RATES: dict[str, Callable[[float, int], float]] = {
    "decay": _decayed,
    "one-cycle": _one_cycle,
    "constant": _constant,
}
"""Progress from 0 to 1 and step → factor of the learning rate; ``decay`` is the paper's."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Network, optimiser and precision. The defaults are the paper's (Kamb & Ganguli, ICML 2025).

    Raises:
        InvalidArgumentError: A field is out of range.
    """

    network: NetworkConfig
    epochs: float = 300
    batch: int = 128
    rate: float = 1e-4
    """Maximum learning rate."""
    schedule: str = "decay"
    """A key of ``RATES``."""
    weight_decay: float = 0.01
    ema: float = 0.0
    """Decay per step of the moving average of the weights; 0 means none."""
    label_dropout: float = 0.0
    """Probability of dropping a label, if the network has a null label."""
    seed: int = 0
    precision: str = "float32"
    """Precision of the passes; weights and their updates are always float32."""
    channels_last: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        _check("epochs", "0 < epochs <= 1e6", self.epochs, 0 < self.epochs <= 1e6)
        _check("batch", "1 to 65536", self.batch, 1 <= self.batch <= 65536)
        _check("rate", "0 < learning rate <= 1", self.rate, 0 < self.rate <= 1)
        _check("schedule", f"one of {', '.join(RATES)}", self.schedule, self.schedule in RATES)
        _check("weight_decay", "0 to 1", self.weight_decay, 0 <= self.weight_decay <= 1)
        _check("ema", "0 <= ema < 1", self.ema, 0 <= self.ema < 1)
        _check("label_dropout", "0 to less than 1", self.label_dropout, 0 <= self.label_dropout < 1)
        _check("seed", "0 <= seed < 2**63", self.seed, 0 <= self.seed < 2**63)
        known = f"one of {', '.join(PRECISIONS)}"
        _check("precision", known, self.precision, self.precision in PRECISIONS)
        if self.network.null_label != (self.label_dropout > 0):
            expected = "above 0 exactly if the network has a null label"
            raise InvalidArgumentError("label_dropout", expected, self.label_dropout)

    def steps(self, images: int) -> int:
        """Return the number of steps for a data set of this size."""
        return max(1, round(self.epochs * images / self.batch))

    def rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.rate * RATES[self.schedule](step / steps, step)

    def described(self) -> dict[str, Any]:
        """Return the settings as JSON."""
        return dataclasses.asdict(self)


def _check(field: str, expected: str, got: object, holds: bool) -> None:
    if not holds:
        raise InvalidArgumentError(field, expected, got)
