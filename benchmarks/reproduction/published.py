"""Published figures and statements about networks and the machines that predict them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MACHINES = {"els": "ELS", "local": "LS", "ideal": "IS"}
STEPS = ("150", "20")
DATA = ("MNIST", "CIFAR10", "FMNIST", "CelebA")
PARAMETERS = {"resnet": 3_900_000, "unet": 1_900_000, "unet-attention": 1_900_000}
"""Minimum parameters of a network of the paper's size, which has 4.0 or 2.0 million."""
MEASURES = ("median_pearson_r", "mean_pearson_r", "median_explained", "mean_explained", "mean_mse")
PUBLISHED = {
    "CIFAR10": {
        "ideal": (-0.401, 0.030),
        "wiener": (0.553, 0.008),
        "els": (0.411, 0.011),
        "pca-released": (0.670, 0.008),
    }
}
"""Mean explained variance and MSE, from the comparison of GoldDiff: 128 images, 10 DDIM steps,
against a UNet without attention, machines without calibrated windows."""


@dataclass(frozen=True)
class Row:
    """A row: median Pearson r of each machine, network at 150 and at 20 steps."""

    data: str
    architecture: str
    padding: str
    conditional: bool
    els: tuple[float, float] | None = None
    local: tuple[float, float] | None = None
    ideal: tuple[float, float] | None = None

    @property
    def key(self) -> tuple[str, str, str, bool]:
        """Fields that identify the row of a comparison."""
        return self.data, self.architecture, self.padding, self.conditional


PAPER = (
    Row("MNIST", "unet", "zeros", False, (0.89, 0.84), (0.88, 0.83), (0.70, 0.69)),
    Row("CIFAR10", "unet", "zeros", True, (0.90, 0.82), (0.87, 0.80), (0.41, 0.39)),
    Row("FMNIST", "unet", "zeros", True, (0.93, 0.91), (0.93, 0.91), (0.80, 0.80)),
    Row("CelebA", "unet", "zeros", False, (0.85, 0.75), (0.90, 0.81), (0.55, 0.51)),
    Row("MNIST", "resnet", "zeros", False, (0.94, 0.94), (0.82, 0.84), (0.61, 0.62)),
    Row("MNIST", "resnet", "circular", False, (0.77, 0.73), (0.36, 0.33), (0.15, 0.14)),
    Row("CIFAR10", "resnet", "zeros", True, (0.95, 0.90), (0.90, 0.86), (0.42, 0.43)),
    Row("CIFAR10", "resnet", "circular", True, (0.94, 0.90), (0.83, 0.80), (0.35, 0.36)),
    Row("FMNIST", "resnet", "zeros", True, (0.94, 0.90), (0.88, 0.88), (0.68, 0.74)),
    Row("CelebA", "resnet", "zeros", False, (0.96, 0.92), (0.90, 0.88), (0.47, 0.48)),
    Row("CIFAR10", "unet-attention", "zeros", True, (0.77, 0.75), (0.77, 0.74), (0.48, 0.47)),
)
"""Kamb & Ganguli, ICML 2025."""


@dataclass(frozen=True)
class Statement:
    """A published statement that a comparison can decide.

    Attributes:
        text: the statement.
        source: who published it, for which data.
        data: data sets that it was published for; it is examined for others as well.
        protocol: of the comparison.
        steps: of the network.
        measure: ``median_pearson_r`` or ``mean_explained``.
        machine: whose measure it is about.
        over: machine whose measure is less, or a number.
    """

    text: str
    source: str
    data: tuple[str, ...]
    protocol: Literal["paper", "ten-steps"]
    steps: str
    measure: Literal["median_pearson_r", "mean_explained"]
    machine: str
    over: str | float


_KAMB, _LATER = "Kamb & Ganguli 2025", "comparison of GoldDiff, 2026"
_ALL = ("MNIST", "CIFAR10", "FMNIST")


def _later(text: str, machine: str, over: str | float) -> Statement:
    return Statement(text, _LATER, ("CIFAR10",), "ten-steps", "10", "mean_explained", machine, over)


STATEMENTS = (
    *(
        Statement(
            f"ELS is closer to the network than {name}, {steps} steps",
            _KAMB,
            _ALL,
            "paper",
            steps,
            "median_pearson_r",
            "els",
            machine,
        )
        for machine, name in (("ideal", "the ideal machine"), ("local", "LS"))
        for steps in STEPS
    ),
    _later("Wiener (.553) beats ELS (.411) on CIFAR-10", "wiener", "els"),
    _later("PCA-locality (.670), published rule, beats ELS on CIFAR-10", "pca-released", "els"),
    _later("PCA-locality by correlation (ours) beats ELS", "pca", "els"),
    _later("PCA-locality, published rule, beats Wiener on CIFAR-10", "pca-released", "wiener"),
    _later("ELS beats the ideal machine (-.401) on CIFAR-10", "els", "ideal"),
    _later("The ideal machine has a mean EV above 0 (published: -.401)", "ideal", 0.0),
)
