"""A UNet of diffusers behind the one denoiser protocol: per-image levels, labels and conditions.

D(x) comes from its output as from any network's (``networks.parametrisation``); what it is told of
the level is ``timesteps.Timesteps.at``. Where the scheduler's configuration has ``clip_sample``, D
is held within its range, and the noise that our samplers and scores go by follows from that D (as
in DDPM; for DDIM that is ``use_clipped_model_output``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from els_kernels import checkpoint
from els_service.denoisers.base import (
    Condition,
    Denoised,
    DenoiserInfo,
    Integers,
    Query,
    check_query,
)
from els_service.denoisers.levels import Floats
from els_service.denoisers.networks.parametrisation import parametrise
from els_service.denoisers.pretrained.folder import (
    Inside,
    Only,
    Part,
    Trained,
    build_part,
    load_part,
    read_trained,
)
from els_service.errors import InvalidArgumentError

UNCONDITIONAL = ("UNet2DModel",)
CONDITIONAL = ("UNet2DModel", "UNet2DConditionModel")

_FLOPS_PER_SECOND = {"cpu": 2e11, "cuda": 3e13}
"""About what two server cores, or a GPU, do; decides what makes a batch."""
_LAUNCH_S = 1e-3
"""Of a call, however small: these networks have many layers."""
_LARGEST_BATCH = 16
"""Rows at once: beyond it a batch is no faster, only larger in memory."""
_ONLY: Only = {
    "time_embedding_type": ("positional", "learned"),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
    "attention_type": ("default",),
}
"""Fields that would ask for inputs that no query has."""


@dataclass(frozen=True, kw_only=True)
class UnetOptions:
    """How a folder's UNet is to be understood and served."""

    variant: str = ""
    """As in ``diffusion_pytorch_model.VARIANT.safetensors``."""
    null_label: bool = False
    """Whether the last label stands for none."""
    condition_rows: int = 77
    """Most rows of a condition; 77 is what Stable Diffusion's text encoder gives."""


class UnetDenoiser:
    """A UNet of diffusers, in float32.

    Args:
        part: with its weights.
        trained: what its scheduler's configuration says.
        options: see there.
        device: where the weights are.
        flops: of one image.
    """

    def __init__(
        self, part: Part, trained: Trained, options: UnetOptions, device: str, flops: int
    ) -> None:
        self._unet, self._trained, self._device = part.module, trained, torch.device(device)
        self._flops_per_second = _FLOPS_PER_SECOND[self._device.type]
        self._flops = flops
        rows = part.config.get("num_class_embeds") or 0
        self._null_row = rows - 1 if options.null_label else None
        self._info = DenoiserInfo(
            kind="diffusers",
            shape=shape_of(part),
            machine=type(part.module).__name__,
            schedule="timesteps",
            own_schedule=trained.timesteps.schedule,
            label_count=rows - options.null_label,
            batch_invariant=False,
            implementation="diffusers float32",
            memory_bytes=memory_of(part.module),
            condition_width=condition_width(part),
            condition_rows=options.condition_rows if condition_width(part) else 0,
        )

    @property
    def info(self) -> DenoiserInfo:
        """What the network is; ``machine`` is its class."""
        return self._info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if shape, a label or a condition does not fit."""
        check_query(self._info, query)
        if self._info.label_count and self._null_row is None and (query.labels < 0).any():
            expected = f"0 to {self._info.label_count - 1}: this network knows no image without one"
            raise InvalidArgumentError("labels", expected, -1)

    def predict_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of operations; guidance doubles it."""
        rows = len(query) + sum(condition.guidance != 1 for condition in query.conditions)
        return _LAUNCH_S + rows * self._flops / self._flops_per_second

    def denoise(self, query: Query) -> Denoised:
        """Return D(x); no evidence."""
        with torch.inference_mode():
            parts = [self._denoise_part(query[images]) for images in _launches(query)]
        return Denoised(parts[0] if len(parts) == 1 else np.concatenate(parts), None)

    def _denoise_part(self, query: Query) -> npt.NDArray[np.float32]:
        checkpoint()
        trained = self._trained
        level = parametrise(trained.prediction, query.level, max_sigma=trained.timesteps.max_sigma)
        x, timestep = query.x, trained.timesteps.at(level.sigma)
        predicted = self._predict(x * _column(level.c_in), timestep, query)
        mean = predicted.mul_(_column(level.c_out)).add_(x * _column(level.c_skip))
        if trained.clip is not None:
            mean.clamp_(-trained.clip, trained.clip)
        return mean.numpy()

    def _predict(self, scaled: Tensor, timestep: Floats, query: Query) -> Tensor:
        """Return the network's guided output for ``scaled`` [B, C, H, W], float32 on the CPU."""
        count, conditions = len(query), query.conditions
        guided = [i for i, condition in enumerate(conditions) if condition.guidance != 1]
        rows = [*range(count), *guided]
        told = np.float32 if not self._trained.timesteps.whole else np.int64
        inputs: dict[str, Any] = {}
        if conditions:
            inputs["encoder_hidden_states"] = _states(conditions, guided).to(self._device)
        if self._info.label_count:
            inputs["class_labels"] = self._label_rows(query.labels[rows]).to(self._device)
        output: Tensor = self._unet(
            scaled[rows].to(self._device),
            torch.from_numpy(timestep[rows].astype(told)).to(self._device),
            return_dict=False,
            **inputs,
        )[0]
        output = output.to("cpu", torch.float32).contiguous()
        given, without = output[:count], output[count:]
        for i, other in zip(guided, without, strict=True):
            given[i] = other + conditions[i].guidance * (given[i] - other)
        return given

    def _label_rows(self, labels: Integers) -> Tensor:
        null = self._null_row
        return torch.from_numpy(labels if null is None else np.where(labels < 0, null, labels))


def load_unet(
    inside: Inside, options: UnetOptions, device: str, classes: tuple[str, ...] = UNCONDITIONAL
) -> UnetDenoiser:
    """Return the denoiser of a diffusers folder: ``unet`` and ``scheduler``.

    Args:
        inside: of the diffusers folder.
        options: how it is to be understood.
        device: where it shall run.
        classes: which of theirs the UNet may be.

    Raises:
        LoadError: A file is missing or refused; names it and the field or tensor.
    """
    part = build_part(inside, "unet", classes, _ONLY)
    _check(part, options)
    trained = read_trained(inside, whole=part.config.get("time_embedding_type") == "learned")
    flops = _count_flops(part)
    load_part(inside, "unet", part, variant=options.variant, device=device)
    return UnetDenoiser(part, trained, options, device, flops)


def shape_of(part: Part) -> tuple[int, int, int]:
    """Return (C, H, W) of a UNet's images.

    Raises:
        LoadError: The configuration does not say.
    """
    size = part.config["sample_size"]
    sides = [size, size] if isinstance(size, int) else size
    if not (
        isinstance(sides, list)
        and len(sides) == 2
        and all(isinstance(side, int) and 1 <= side <= 4096 for side in sides)
    ):
        raise part.refuse("sample_size", "a number of pixels, or [height, width], to 4096")
    return part.config["in_channels"], *sides


def condition_width(part: Part) -> int:
    """Return the numbers of one row of a condition; 0 for a UNet that takes none.

    Raises:
        LoadError: Blocks want different widths.
    """
    if "cross_attention_dim" not in part.config:
        return 0
    width = part.config["cross_attention_dim"]
    if not isinstance(width, int) or width < 1:
        raise part.refuse("cross_attention_dim", "one number")
    return width


def memory_of(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _check(part: Part, options: UnetOptions) -> None:
    """Raise LoadError if the UNet wants or gives what a denoiser does not."""
    config = part.config
    if config["out_channels"] != config["in_channels"]:
        raise part.refuse("out_channels", f"{config['in_channels']}, as in_channels")
    labels = config.get("num_class_embeds")
    if options.null_label and not (labels and labels > 1):
        raise part.refuse("num_class_embeds", "more than one label beside null_label")


def _count_flops(part: Part) -> int:
    """Return the operations of one image; proves, too, that the network takes such images.

    Raises:
        LoadError: It does not.
    """
    # Here, because it imports triton, which a server without networks has no use for.
    from torch.utils.flop_counter import FlopCounterMode

    shape, width = shape_of(part), condition_width(part)
    inputs: dict[str, Tensor] = {}
    if width:
        inputs["encoder_hidden_states"] = torch.empty(1, 1, width, device="meta")
    if part.config.get("num_class_embeds"):
        inputs["class_labels"] = torch.zeros(1, dtype=torch.int64, device="meta")
    x = torch.empty(1, *shape, device="meta")
    timestep = torch.zeros(1, dtype=torch.int64, device="meta")
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            output = part.module(x, timestep, return_dict=False, **inputs)[0]
    except Exception as error:
        # Theirs to refuse: sizes that cannot be halved so often, and the like.
        text = " ".join(str(error).split())
        expected = f"a size that the blocks can halve ({text:.120})"
        raise part.refuse("sample_size", expected) from error
    if output.shape != x.shape:
        raise part.refuse("sample_size", f"one that is kept, not {list(output.shape[2:])}")
    return int(counter.get_total_flops())


def _launches(query: Query) -> Iterator[slice]:
    """Yield slices of images that the network can take at once: conditions of one length each."""
    first = 0
    lengths = [len(condition.given) for condition in query.conditions] or [0] * len(query)
    for _, group in itertools.groupby(lengths):
        end = first + len(list(group))
        for start in range(first, end, _LARGEST_BATCH):
            yield slice(start, min(start + _LARGEST_BATCH, end))
        first = end


def _states(conditions: Sequence[Condition], guided: Sequence[int]) -> Tensor:
    """Return what each row attends to, [B + guided, T, W]."""
    others = [conditions[i].unconditional for i in guided]
    given = [condition.given for condition in conditions]
    return torch.from_numpy(np.stack([*given, *(other for other in others if other is not None)]))


def _column(values: Floats) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).view(-1, 1, 1, 1)
