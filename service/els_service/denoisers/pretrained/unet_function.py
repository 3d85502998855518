"""A network of diffusers as the function F of its engines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from els_service.denoisers.engines.modules import Function
from els_service.denoisers.engines.probe import Array
from els_service.denoisers.pretrained.folder import Part, Trained

_PROBED_ROWS = 2
"""Rows of the conditions of a probe."""


class _Called(nn.Module):
    """A network of diffusers as a function of tensors: x, timestep, labels, condition.

    Args:
        network: of diffusers.
        channels: of its images; further ones of its output, a learned variance, are dropped.
        inputs: names of its inputs after the timestep.
    """

    def __init__(self, network: nn.Module, channels: int, inputs: Sequence[str]) -> None:
        super().__init__()
        self.network, self.channels, self.inputs = network, channels, tuple(inputs)

    def forward(
        self, x: Tensor, timestep: Tensor, first: Tensor | None = None, second: Tensor | None = None
    ) -> Tensor:
        """Return the prediction, in the dtype of x."""
        given = dict(zip(self.inputs, (first, second), strict=False))
        output: Tensor = self.network(x, timestep, return_dict=False, **given)[0]
        return output[:, : self.channels]


def _inputs_of(part: Part, rows: int) -> tuple[str, ...]:
    """Return the names of a network's inputs after image and timestep."""
    labels = ("class_labels",) if rows else ()
    return (*labels, "encoder_hidden_states") if condition_width(part) else labels


def function_of(part: Part, trained: Trained, shape: tuple[int, int, int], rows: int) -> Function:
    """Return the function x, timestep, labels and conditions → F, without the last two if unused.

    Args:
        part: the network with its weights.
        trained: training parameters from the scheduler's configuration.
        shape: (C, H, W) of its images.
        rows: of its label embedding.

    Raises:
        LoadError: Blocks have conditions of different widths.
    """
    inputs = _inputs_of(part, rows)

    def example(images: int) -> list[Array]:
        numbers = np.random.default_rng(0)
        x = numbers.standard_normal((images, *shape)).astype(np.float32)
        highest, lowest = trained.timesteps.max_sigma, trained.timesteps.min_sigma
        timestep = trained.timesteps.at(np.geomspace(highest, lowest, images))
        given: dict[str, Array] = {
            "class_labels": np.arange(images)[::-1] % max(rows, 1),
            "encoder_hidden_states": numbers.standard_normal(
                (images, _PROBED_ROWS, condition_width(part))
            ).astype(np.float32),
        }
        whole = trained.timesteps.whole
        first = [x, timestep.astype(np.int64 if whole else np.float32)]
        return first + [given[name] for name in inputs]

    places = ("first", "second")[: len(inputs)]
    conditions = places[-1:] if condition_width(part) else ()
    return Function(
        module=_Called(part.module, shape[0], inputs).eval(),
        names=("x", "timestep", *places),
        cast=("x", *conditions),
        example=example,
        open=conditions,
    )


def condition_width(part: Part) -> int:
    """Return the width of a condition; 0 for a UNet without conditioning.

    Raises:
        LoadError: Blocks have different widths.
    """
    if "cross_attention_dim" not in part.config:
        return 0
    width = part.config["cross_attention_dim"]
    if not isinstance(width, int) or width < 1:
        raise part.refuse("cross_attention_dim", "one number")
    return width
