"""References whose results are computed once for all that is compared with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor

from els_kernels.reference_fold_statistics import ReferenceFoldPosterior
from els_kernels.reference_statistics import ReferencePosterior

_KNOWN: dict[tuple[object, ...], Any] = {}
Method = TypeVar("Method", bound=Callable[..., Any])


def _key(value: Any) -> object:
    """Return a key that is equal for equal arguments."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.contiguous().numpy().tobytes()
    return tuple(map(_key, value)) if isinstance(value, list | tuple) else value


def _once(method: Method) -> Method:
    """Return a method that looks for its result among those of equal references.

    A point that is differentiated is another at each call.
    """

    @wraps(method)
    def known(self: Any, *along: Tensor) -> Any:
        if any(tensor.requires_grad for tensor in along):
            return method(self, *along)
        own = [_key(getattr(self, field.name)) for field in fields(self)]
        key = method, *own, _key(along)
        if key not in _KNOWN:
            _KNOWN[key] = method(self, *along)
        return _KNOWN[key]

    return cast(Method, known)


class KnownPosterior(ReferencePosterior):
    """Reference of patch attention."""

    mean = _once(ReferencePosterior.mean)
    vjp = _once(ReferencePosterior.vjp)
    jvp = _once(ReferencePosterior.jvp)
    log_weights = _once(ReferencePosterior.log_weights)
    variance = _once(ReferencePosterior.variance)
    entropy = _once(ReferencePosterior.entropy)
    shares = _once(ReferencePosterior.shares)


class KnownFoldPosterior(ReferenceFoldPosterior):
    """Reference of a fold."""

    mean = _once(ReferenceFoldPosterior.mean)
    vjp = _once(ReferenceFoldPosterior.vjp)
    jvp = _once(ReferenceFoldPosterior.jvp)
    weights = _once(ReferenceFoldPosterior.weights)
    variance = _once(ReferenceFoldPosterior.variance)
    entropy = _once(ReferenceFoldPosterior.entropy)
    shares = _once(ReferenceFoldPosterior.shares)
