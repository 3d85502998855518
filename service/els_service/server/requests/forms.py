"""Forms: the part of a request's validation that depends only on model, shapes and dtypes.

A form is validated once and found by these values. Levels, labels, windows, conditioning and pixels
are decoded and checked at each call, so a caller whose noise level changes with each call pays the
same as one that repeats it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from els_service.denoisers.base import DenoiserInfo, Integers, Query, one_each
from els_service.denoisers.levels import NoiseLevel
from els_service.engine.model_versions import ModelVersion
from els_service.errors import InvalidArgumentError

MAX_FORMS = 256
"""Maximum forms of one method; clients choose shapes freely."""

_LENGTH_DELIMITED = 2
_ANY_LEVEL = NoiseLevel.of([(1.0, 1.0)])


@dataclass(eq=False, slots=True)
class Form:
    """Validated common part of requests to one version of a model.

    Attributes:
        info: of the version that validated it; a reload invalidates the form.
        checked: whether the loaded denoiser accepts such a query without labels, windows and
            conditioning, at any level.
        shape: of the pixels, [B, C, H, W].
        labels: default labels, [B], read-only.
        windows: default windows, [B], read-only.
    """

    info: DenoiserInfo
    checked: bool
    shape: tuple[int, ...]
    labels: Integers
    windows: Integers


_F = TypeVar("_F", bound=Form)


class FormCache(Generic[_F]):
    """Bounded cache of the forms of one method, by value."""

    def __init__(self) -> None:
        self._forms: dict[Hashable, _F] = {}

    def __len__(self) -> int:
        return len(self._forms)

    def get(self, key: Hashable, info: DenoiserInfo) -> _F | None:
        """Return the form of a key; None if this load of the model has none."""
        form = self._forms.get(key)
        return form if form is not None and form.info is info else None

    def put(self, key: Hashable, form: _F) -> _F:
        """Store and return a form."""
        if len(self._forms) >= MAX_FORMS:
            self._forms.clear()
        self._forms[key] = form
        return form


def defaults(shape: tuple[int, ...], served: ModelVersion) -> tuple[bool, Integers, Integers]:
    """Return whether the model accepts queries of a shape, and their default labels and windows.

    Args:
        shape: of the pixels, [B, C, H, W].
        served: served version; an unloaded one returns False.
    """
    batch = shape[0]
    labels = one_each("labels", (), batch, none=-1)
    windows = one_each("windows", (), batch, none=0)
    if served.loaded is None:
        return False, labels, windows
    query = Query(black(shape), _ANY_LEVEL.repeat(batch), labels, windows, ())
    try:
        served.loaded.denoiser.check(query)
    except InvalidArgumentError:
        return False, labels, windows  # the engine raises it after the rest is decoded
    return True, labels, windows


def black(shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return read-only zeros [B, C, H, W] that share one element."""
    return np.broadcast_to(np.float32(0), shape)


def field_head(number: int, size: int) -> bytes:
    """Return the encoded tag and length of a length-delimited protobuf field of ``size`` bytes.

    See https://protobuf.dev/programming-guides/encoding/.
    """
    encoded = bytearray()
    for rest in (number << 3 | _LENGTH_DELIMITED, size):
        while rest > 0x7F:
            encoded.append(rest & 0x7F | 0x80)
            rest >>= 7
        encoded.append(rest)
    return bytes(encoded)


def check(served: ModelVersion, query: Query) -> bool:
    """Check a query by its model before its pixels are decoded; return whether it is loaded.

    Raises:
        InvalidArgumentError: The model rejects it.
    """
    if served.loaded is None:
        return False
    served.loaded.denoiser.check(query)
    return True
