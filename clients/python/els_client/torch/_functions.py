"""A served denoiser as functions of torch, with derivatives by the server's Jacobian products.

``forward`` takes no context and ``setup_context`` saves what derivatives need: ``torch.func``
accepts no other form. A derivative is itself a function here, so that it is computed on plain
tensors under any transform. ``vmap`` joins its dimension with that of the images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from els_client._models import Model
from els_client._types import Evidence, Images, Pixels, QueryOptions

Direction: TypeAlias = Literal["vjp", "jvp"]
"""``vjp``: Jᵀg of a cotangent g; ``jvp``: J u of a tangent u."""
Check: TypeAlias = Callable[[Tensor, Any], None]
"""Raises an error for images and levels that an adapter knows to be in other units."""
_ADJOINT: dict[Direction, Direction] = {"vjp": "jvp", "jvp": "vjp"}
_PER_IMAGE = ("label", "window", "conditioning", "unconditional")
"""Options that may have one value for each image."""


class Denoises(Protocol):
    """Methods that adapters use: those of ``Client`` and ``LocalClient``."""

    def model(self, name: str, *, version: str | None = None) -> Model:
        """Return the description of a model."""
        ...

    def denoise(self, x: Pixels, **options: Unpack[QueryOptions]) -> Images:
        """Return D(x)."""
        ...

    def denoise_with_variance(
        self, x: Pixels, **options: Unpack[QueryOptions]
    ) -> tuple[Images, Images]:
        """Return D(x) and the posterior variance of each pixel."""
        ...

    def vjp(
        self,
        x: Pixels,
        cotangent: Pixels,
        *,
        evidence: Evidence | None = None,
        **options: Unpack[QueryOptions],
    ) -> tuple[Images, Images]:
        """Return D(x) and Jᵀg."""
        ...

    def jvp(
        self,
        x: Pixels,
        tangent: Pixels,
        *,
        evidence: Evidence | None = None,
        **options: Unpack[QueryOptions],
    ) -> tuple[Images, Images]:
        """Return D(x) and J u."""
        ...


@dataclass(eq=False, slots=True)
class ServedCall:
    """One evaluation of D: all of its query but images and levels.

    Attributes:
        client: Answers the query.
        options: Of the query, without a level.
        level: Name of the levels, ``sigma`` or ``alpha_bar``.
        max_bytes: Of a message, which evidence is not to exceed.
        check: Checks images and levels before they are sent.
        evidence: Of the images, which products of one point share.
    """

    client: Denoises
    options: Mapping[str, Any]
    level: str
    max_bytes: int
    check: Check | None = None
    evidence: Evidence = field(default_factory=Evidence)

    def denoise(self, x: Tensor, level: Any) -> Tensor:
        """Return D(x), of the dtype and device of x."""
        if self.check is not None:
            self.check(x, level)
        return like(self.client.denoise(_pixels(x), **self._query(level)), x)

    def variance(self, x: Tensor, level: Any) -> Tensor:
        """Return the posterior variance of each pixel, of the dtype and device of x."""
        return like(self.client.denoise_with_variance(_pixels(x), **self._query(level))[1], x)

    def product(self, kind: Direction, x: Tensor, level: Any, along: Tensor) -> Tensor:
        """Return Jᵀg (``vjp``) or J u (``jvp``), of the dtype and device of ``along``."""
        multiply = self.client.vjp if kind == "vjp" else self.client.jvp
        # float64, of each pixel one number for each channel and one more, and its signature.
        size = 16 * x.numel() // x.shape[1] * (1 + x.shape[1]) + 8 * x.numel()
        evidence = self.evidence if size < self.max_bytes else None
        pixels, direction = _pixels(x), _pixels(along)
        return like(multiply(pixels, direction, evidence=evidence, **self._query(level))[1], along)

    def repeated(self, copies: int) -> ServedCall:
        """Return the call for so many copies of its images, one after another."""
        options = {
            name: _repeated(value, copies) if name in _PER_IMAGE else value
            for name, value in self.options.items()
        }
        return replace(self, options=options, evidence=Evidence())

    def _query(self, level: Any) -> Any:
        return {**self.options, self.level: level}


def _is_plain(x: Tensor) -> bool:
    """Return whether x is of the dtype and device of arrays: float32, of the host."""
    return x.dtype is torch.float32 and x.is_cpu


def _pixels(x: Tensor) -> Pixels:
    """Return plain tensors as arrays, which spares the client to find out how."""
    return x.detach().numpy() if _is_plain(x) else x


def like(array: Images, x: Tensor) -> Tensor:
    """Return an array as a tensor of the dtype, if floating, and device of x."""
    found = torch.from_numpy(array)
    if _is_plain(x):
        return found
    return found.to(x if x.is_floating_point() else x.device)


def _repeated(value: Any, copies: int) -> Any:
    """Return the values of so many copies of some images; one for all images stays one."""
    if value is None or not np.ndim(value) or len(value) == 1:
        return value
    if isinstance(value, Tensor):
        return torch.cat([value] * copies)
    return np.concatenate([np.asarray(value)] * copies)


class _Denoise(torch.autograd.Function):
    """(x, level, call) → D(x)."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        x, level, call = inputs
        found: Tensor = call.denoise(x, level)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        _check_fixed(ctx.needs_input_grad[1])
        return product(*_saved(ctx), cotangents[0], "vjp"), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _check_fixed(tangents[1] is not None)
        return product(*_saved(ctx), tangents[0], "jvp")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        x, level, call = _joined(info.batch_size, in_dims, inputs)
        return _parted(denoise(x, level, call), info.batch_size), 0


class _Product(torch.autograd.Function):
    """(x, level, call, along, kind) → product with the Jacobian at x, linear in ``along``."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        x, level, call, along, kind = inputs
        found: Tensor = call.product(kind, x, level, along)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, _, ctx.kind = inputs
        _save(ctx, *saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        _check_first(ctx.needs_input_grad[0])
        _check_fixed(ctx.needs_input_grad[1])
        adjoint = product(*_saved(ctx), cotangents[0], _ADJOINT[ctx.kind])
        return None, None, None, adjoint, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _check_first(tangents[0] is not None)
        _check_fixed(tangents[1] is not None)
        return product(*_saved(ctx), tangents[3], ctx.kind)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        x, level, call, along, kind = _joined(info.batch_size, in_dims, inputs)
        return _parted(product(x, level, call, along, kind), info.batch_size), 0


_forward: Any
for _forward in (_Denoise.forward, _Product.forward):
    # torch asks for it at each call and binds the arguments: with this one, and one parameter, that
    # does not take a tenth of a small request.
    _forward.__signature__ = inspect.signature(_forward)

_are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def denoise(x: Tensor, level: Any, call: ServedCall) -> Tensor:
    """Return D(x), differentiable by x.

    Args:
        x: [B, C, H, W].
        level: A number, or one for each image.
        call: Answers.
    """
    if not _is_differentiated(x, level):
        return call.denoise(x, level)
    apply: Callable[..., Tensor] = _Denoise.apply
    return apply(x, level, call)


def _is_differentiated(x: Tensor, level: Any) -> bool:
    """Return whether a gradient is recorded, or a transform may see what is done with x."""
    recorded = x.requires_grad or (isinstance(level, Tensor) and level.requires_grad)
    if _are_transforms_active() or (recorded and torch.is_grad_enabled()):
        return True
    unpack: Any = forward_ad.unpack_dual
    return unpack(x).tangent is not None


def product(x: Tensor, level: Any, call: ServedCall, along: Tensor, kind: Direction) -> Tensor:
    """Return Jᵀg or J u at x, differentiable by ``along``."""
    apply: Callable[..., Tensor] = _Product.apply
    return apply(x, level, call, along, kind)


def _save(ctx: Any, x: Tensor, level: Any, call: ServedCall) -> None:
    ctx.call = call
    # A tensor that is not saved by these keeps its graph alive.
    tensors = (x, level) if isinstance(level, Tensor) else (x,)
    ctx.level = None if isinstance(level, Tensor) else level
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _saved(ctx: Any) -> tuple[Tensor, Any, ServedCall]:
    x, *level = ctx.saved_tensors
    return x, level[0] if level else ctx.level, ctx.call


def _check_fixed(differentiated: bool) -> None:
    if differentiated:
        raise RuntimeError(
            "level: expected one without a gradient, as the server has no derivative by it, "
            "got one that requires it; call detach() on it"
        )


def _check_first(differentiated: bool) -> None:
    if differentiated:
        raise RuntimeError(
            "expected first derivatives, got a second: the server has no derivative of a product "
            "with the Jacobian by x"
        )


def _joined(copies: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """Return the inputs of ``copies`` calls as those of one, whose images follow one another."""
    found: list[Any] = []
    for value, dim in zip(inputs, in_dims, strict=True):
        if isinstance(value, ServedCall):
            found.append(value.repeated(copies))
        elif not isinstance(value, Tensor) or (dim is None and value.ndim == 0):
            found.append(_repeated(value, copies))
        else:
            each = value.expand(copies, *value.shape) if dim is None else value.movedim(dim, 0)
            found.append(each.flatten(0, 1) if each.ndim > 1 else each)
    x, level = found[:2]
    images = x.shape[0] // copies
    if isinstance(level, Tensor) and level.ndim and level.numel() == copies:
        # One level for all images of a call.
        found[1] = level.reshape(copies).repeat_interleave(images)
    return found


def _parted(joined: Tensor, copies: int) -> Tensor:
    return joined.reshape(copies, -1, *joined.shape[1:])
