"""Denoiser of a diffusers UNet or DiT: per-image levels, labels and conditions.

D(x) is computed from its output as for any network (``networks.parametrisation``); its time input
is ``timesteps.Timesteps.at``. If the scheduler's configuration has ``clip_sample``, D is clipped to
its range, and samplers and scores derive the noise from the clipped D (as in DDPM; for DDIM that is
``use_clipped_model_output``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from els_kernels import checkpoint
from els_service.denoisers.answers import check_finite
from els_service.denoisers.base import Denoised, DenoiserInfo, Integers, Query
from els_service.denoisers.engines.modules import choose_engine
from els_service.denoisers.engines.options import EngineOptions
from els_service.denoisers.engines.probe import Array
from els_service.denoisers.gradients import Direction, Product, automatic_product, joined
from els_service.denoisers.levels import Floats
from els_service.denoisers.networks.parametrisation import parametrise
from els_service.denoisers.pretrained.folder import (
    Only,
    Part,
    Trained,
    build_part,
    load_part,
    read_trained,
)
from els_service.denoisers.pretrained.unet_batches import guidance_of, launches_of, states_of
from els_service.denoisers.pretrained.unet_function import condition_width, function_of
from els_service.denoisers.pretrained.weights import Inside
from els_service.denoisers.query_checks import check_query
from els_service.errors import InvalidArgumentError

DIT = "DiTTransformer2DModel"
UNCONDITIONAL = ("UNet2DModel", DIT)
CONDITIONAL = ("UNet2DModel", "UNet2DConditionModel", DIT)

_FLOPS_PER_SECOND = {"cpu": 2e11, "cuda": 3e13}
"""Approximate operations per second of two CPU cores and a GPU; determines batch sizes."""
_LAUNCH_S = 1e-3
"""Minimum duration of a call in seconds: these networks have many layers."""
_FLOPS: dict[tuple[object, ...], int] = {}
"""Class, configuration and inputs → operations: counting takes .2 s, and models are reloaded."""
_COUNTED = 64
"""Most configurations in it."""
_PRODUCT_COSTS = {"vjp": 3.0, "jvp": 6.0}
"""Cost of a Jacobian product in forward passes."""
_ONLY: Only = {
    "time_embedding_type": ("positional", "learned"),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
    "attention_type": ("default",),
}
"""Fields that enable inputs that a query does not have."""
_OUT_CHANNELS = "{}, as in_channels, or twice that and a scheduler whose variance_type is learned"


@dataclass(frozen=True, kw_only=True)
class UnetOptions:
    """Options for loading the UNet of a folder."""

    variant: str = ""
    """VARIANT of ``diffusion_pytorch_model.VARIANT.safetensors``."""
    null_label: bool = False
    """Whether the last label means none."""
    condition_rows: int = 77
    """Maximum rows of a condition; Stable Diffusion's text encoder returns 77."""
    network: str = ""
    """Folder of the network; empty for ``unet``, or ``transformer`` where only that exists, or the
    diffusers folder itself, where its configuration is there."""
    shape: tuple[int, int, int] | None = None
    """(C, H, W); required if the configuration has no ``sample_size``."""
    engine: EngineOptions = field(default_factory=EngineOptions)


class UnetDenoiser:
    """A UNet of diffusers.

    Args:
        part: the UNet with its weights.
        trained: training parameters from the scheduler's configuration.
        options: loading options.
        device: device of the weights.
        flops: floating-point operations of one image.

    Raises:
        EngineError: The machine lacks the engine or precision, and there is no fallback.
    """

    def __init__(
        self, part: Part, trained: Trained, options: UnetOptions, device: str, flops: int
    ) -> None:
        self._trained, self._device = trained, torch.device(device)
        self._flops_per_second = _FLOPS_PER_SECOND[self._device.type]
        self._flops = flops
        shape = shape_of(part, options)
        rows, self._null_row = _label_rows(part, options)
        function = function_of(part, trained, shape, rows)
        engine, module = choose_engine(function, self._device, options.engine, part.path.parent)
        # Differentiated as it is, whatever computes ``denoise``.
        self._run, self._module = engine.run, module
        self._dtype = next(iter(module.parameters())).dtype
        self._info = DenoiserInfo(
            kind="diffusers",
            shape=shape,
            machine=type(part.module).__name__,
            schedule="timesteps",
            own_schedule=trained.timesteps.schedule,
            trained_sigma=(trained.timesteps.min_sigma, trained.timesteps.max_sigma),
            scheduler=trained.scheduler,
            label_count=rows - (self._null_row is not None),
            label_guidance=self._null_row is not None and not condition_width(part),
            batch_invariant=False,
            has_gradients=True,
            implementation="diffusers float32"
            if (engine.name, engine.precision) == ("torch", "float32")
            else engine.description,
            memory_bytes=memory_of(module) + engine.memory_bytes,
            engine=engine.name,
            engine_reason=engine.reason,
            precision=engine.precision,
            precision_error=engine.error,
            condition_width=condition_width(part),
            condition_rows=options.condition_rows if condition_width(part) else 0,
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the network; ``machine`` is its class."""
        return self._info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if shape, a label or a condition is not supported."""
        check_query(self._info, query)
        if self._info.label_count and self._null_row is None and (query.labels < 0).any():
            expected = f"0 to {self._info.label_count - 1}: this network requires a label"
            raise InvalidArgumentError("labels", expected, -1)

    def predict_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of operations; guidance doubles it."""
        rows = len(query) + len(guidance_of(query))
        return _LAUNCH_S + rows * self._flops / self._flops_per_second

    def denoise(self, query: Query) -> Denoised:
        """Return D(x), without evidence.

        Raises:
            ElsError: The network returned NaN or infinity.
        """
        parts = [self._denoise_part(query[images]) for images in launches_of(query)]
        return Denoised(parts[0] if len(parts) == 1 else np.concatenate(parts), None)

    def vjp(self, query: Query, cotangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and Jᵀg by automatic differentiation; 0 where D is clipped."""
        return self._product(query, cotangent, "vjp")

    def jvp(self, query: Query, tangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and J u by automatic differentiation; 0 where D is clipped."""
        return self._product(query, tangent, "jvp")

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return a multiple of the time of ``denoise``."""
        return _PRODUCT_COSTS[direction] * self.predict_seconds(query)

    def _product(self, query: Query, along: npt.NDArray[np.float32], kind: Direction) -> Product:
        # One image at a time: the activations of all layers are held.
        return joined(
            [
                self._product_one(query[slice(i, i + 1)], along[i : i + 1], kind)
                for i in range(len(query))
            ]
        )

    def _product_one(
        self, query: Query, along: npt.NDArray[np.float32], kind: Direction
    ) -> Product:
        checkpoint()
        return automatic_product(
            lambda x: self._mean(query, x, self._differentiable), query.pixels, along, kind
        )

    def _denoise_part(self, query: Query) -> npt.NDArray[np.float32]:
        checkpoint()
        with torch.inference_mode():
            return self._mean(query, query.x, self._computed).numpy()

    def _mean(self, query: Query, x: Tensor, network: _Network) -> Tensor:
        """Return D(x), [B, C, H, W] float32 on the CPU, at the levels of a query."""
        trained = self._trained
        level = parametrise(
            trained.prediction,
            query.level,
            trained.sigma_data,
            max_sigma=trained.timesteps.max_sigma,
        )
        timestep = trained.timesteps.at(level.sigma)
        predicted = self._predict(x * _column(level.c_in), timestep, query, network)
        mean = predicted.mul_(_column(level.c_out)).add_(x * _column(level.c_skip))
        # Before they are clipped, which would make images of infinities.
        check_finite(mean.detach().numpy(), "the network")
        if trained.clip is not None:
            clipped = mean.clamp(-trained.clip, trained.clip)
            if query.unclipped is None:
                mean = clipped
            else:
                kept = torch.from_numpy(query.unclipped).view(-1, 1, 1, 1)
                mean = torch.where(kept, mean, clipped)
        return mean

    def _predict(self, scaled: Tensor, timestep: Floats, query: Query, network: _Network) -> Tensor:
        """Return the network's guided output for ``scaled`` [B, C, H, W], float32 on the CPU."""
        count, conditions, guided = len(query), query.conditions, guidance_of(query)
        rows = [*range(count), *guided]
        dtype = np.float32 if not self._trained.timesteps.whole else np.int64
        inputs: list[Array] = [timestep[rows].astype(dtype)]
        if self._info.label_count:
            labels = query.labels[rows]
            if not conditions:
                labels[count:] = -1
            inputs.append(self._class_labels(labels))
        if conditions:
            inputs.append(states_of(conditions, guided))
        output = network(scaled[rows], inputs)
        given, without = output[:count], output[count:]
        for (i, guidance), other in zip(guided.items(), without, strict=True):
            given[i] = other + guidance * (given[i] - other)
        return given

    def _computed(self, x: Tensor, inputs: Sequence[Array]) -> Tensor:
        """Return the output by the engine."""
        return torch.from_numpy(self._run(x.numpy(), *inputs))

    def _differentiable(self, x: Tensor, inputs: Sequence[Array]) -> Tensor:
        """Return the output by torch."""
        others = [torch.from_numpy(one).to(self._device) for one in inputs]
        if self._info.condition_width:
            others[-1] = others[-1].to(self._dtype)
        output: Tensor = self._module(x.to(self._device, self._dtype), *others)
        return output.to("cpu", torch.float32).contiguous()

    def _class_labels(self, labels: Integers) -> Integers:
        null = self._null_row
        return labels if null is None else np.where(labels < 0, null, labels)


_Network = Callable[[Tensor, Sequence[Array]], Tensor]
"""x [B, C, H, W] and further inputs → F, float32 on the CPU."""


def load_unet(
    inside: Inside, options: UnetOptions, device: str, classes: tuple[str, ...] = UNCONDITIONAL
) -> UnetDenoiser:
    """Return the denoiser of a diffusers folder: ``unet`` and ``scheduler``.

    Args:
        inside: resolver of names in the diffusers folder.
        options: loading options.
        device: device to run on.
        classes: allowed classes of the UNet.

    Raises:
        LoadError: A file is missing or rejected; names it and the field or tensor.
    """
    name = options.network or _network_folder(inside)
    part = build_part(inside, name, classes, _ONLY)
    has_variance = _check(part, options)
    whole = part.config.get("time_embedding_type") == "learned"
    trained = read_trained(inside, whole=whole, has_variance=has_variance)
    # The pipeline of DiT drops the variance itself, whatever its scheduler says.
    if has_variance and not trained.learned_variance and type(part.module).__name__ != DIT:
        raise part.refuse("out_channels", _OUT_CHANNELS.format(part.config["in_channels"]))
    flops = _count_flops(part, options)
    load_part(inside, name, part, variant=options.variant, device=device)
    return UnetDenoiser(part, trained, options, device, flops)


def _network_folder(inside: Inside) -> str:
    for name in ("unet", "transformer"):
        if inside.names(name):
            return name
    # As a module saves itself, and as the first published pipelines are.
    return "." if "config.json" in inside.names(".") else "unet"


def _label_rows(part: Part, options: UnetOptions) -> tuple[int, int | None]:
    """Return the number of rows of the label embedding, and the row that means none."""
    if type(part.module).__name__ == DIT:
        labels: int = part.config["num_embeds_ada_norm"]
        # Trained with dropped labels; the row is beyond the labels.
        return labels + 1, labels
    rows = part.config.get("num_class_embeds") or 0
    return rows, rows - 1 if options.null_label else None


def shape_of(part: Part, options: UnetOptions) -> tuple[int, int, int]:
    """Return (C, H, W) of a network's images.

    Raises:
        LoadError: Neither the configuration nor the options define it, or the channels differ.
    """
    channels: int = part.config["in_channels"]
    if options.shape:
        if options.shape[0] != channels:
            raise part.refuse("in_channels", f"{options.shape[0]}, as the shape in model.yaml")
        return options.shape
    size = part.config["sample_size"]
    sides = [size, size] if isinstance(size, int) else size
    if not (
        isinstance(sides, list)
        and len(sides) == 2
        and all(isinstance(side, int) and 1 <= side <= 4096 for side in sides)
    ):
        expected = "a number of pixels, or [height, width], to 4096, or a shape in model.yaml"
        raise part.refuse("sample_size", expected)
    return channels, *sides


def memory_of(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _check(part: Part, options: UnetOptions) -> bool:
    """Return whether the output has twice the channels of the input.

    Raises:
        LoadError: Inputs or outputs of the network are not those of a denoiser.
    """
    config = part.config
    channels = config["in_channels"]
    outputs = config["out_channels"] or channels
    if outputs not in (channels, 2 * channels):
        raise part.refuse("out_channels", _OUT_CHANNELS.format(channels))
    if type(part.module).__name__ == DIT:
        return bool(outputs != channels)
    labels = config.get("num_class_embeds")
    if options.null_label and not (labels and labels > 1):
        raise part.refuse("num_class_embeds", "more than one label beside null_label")
    return bool(outputs != channels)


def _count_flops(part: Part, options: UnetOptions) -> int:
    """Return the operations of one image; also checks that the network accepts such images.

    Raises:
        LoadError: The network rejects them.
    """
    # Local import: it imports triton, which a server without networks does not need.
    from torch.utils.flop_counter import FlopCounterMode

    shape, width = shape_of(part, options), condition_width(part)
    labelled = bool(_label_rows(part, options)[0])
    config = json.dumps(dict(part.config), sort_keys=True, default=str)
    key = type(part.module).__name__, config, shape, width, labelled
    if key in _FLOPS:
        return _FLOPS[key]
    inputs: dict[str, Tensor] = {}
    if width:
        inputs["encoder_hidden_states"] = torch.empty(1, 1, width, device="meta")
    if labelled:
        inputs["class_labels"] = torch.zeros(1, dtype=torch.int64, device="meta")
    x = torch.empty(1, *shape, device="meta")
    timestep = torch.zeros(1, dtype=torch.int64, device="meta")
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            output = part.module(x, timestep, return_dict=False, **inputs)[0]
    except Exception as error:
        # Raised by diffusers: sizes that cannot be halved that often, for example.
        text = " ".join(str(error).split())
        expected = f"a size that the blocks can halve ({text:.120})"
        raise part.refuse("sample_size", expected) from error
    if output.shape[2:] != x.shape[2:]:
        raise part.refuse("sample_size", f"the size of the output, {list(output.shape[2:])}")
    flops = int(counter.get_total_flops())
    _FLOPS[key] = flops
    if len(_FLOPS) > _COUNTED:
        del _FLOPS[next(iter(_FLOPS))]
    return flops


def _column(values: Floats) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).view(-1, 1, 1, 1)
