"""Forms: what follows from a request's model, shapes and dtypes alone, validated once.

Levels, labels, windows, conditions and pixels differ from call to call and are read and checked
every time; the rest is the same for all requests of one form. Forms are found by value, so they
serve callers whose noise level is new at every call as well as those who repeat it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from els_service.denoisers.base import DenoiserInfo, Integers, Query, one_each
from els_service.denoisers.levels import NoiseLevel
from els_service.engine.registry import ModelVersion
from els_service.errors import InvalidArgumentError

MAX_FORMS = 256
"""Of one method; clients choose shapes freely."""

_LENGTH_DELIMITED = 2
_ANY_LEVEL = NoiseLevel.of([(1.0, 1.0)])


@dataclass(eq=False, slots=True)
class Form:
    """Common part of requests to one version of a model.

    Attributes:
        info: of the version that validated it; a reload validates again.
        checked: whether the loaded denoiser takes such a query without labels, windows and
            conditions, at any level.
        shape: of the pixels, [B, C, H, W].
        labels: of a request without labels, [B], read-only.
        windows: of a request without windows, [B], read-only.
    """

    info: DenoiserInfo
    checked: bool
    shape: tuple[int, ...]
    labels: Integers
    windows: Integers


_F = TypeVar("_F", bound=Form)


class FormCache(Generic[_F]):
    """Forms of one method, by value; bounded."""

    def __init__(self) -> None:
        self._forms: dict[Hashable, _F] = {}

    def __len__(self) -> int:
        return len(self._forms)

    def get(self, key: Hashable, info: DenoiserInfo) -> _F | None:
        """Return the form of a key; None where there is none of this load of the model."""
        form = self._forms.get(key)
        return form if form is not None and form.info is info else None

    def put(self, key: Hashable, form: _F) -> _F:
        """Keep and return a form."""
        if len(self._forms) >= MAX_FORMS:
            self._forms.clear()
        self._forms[key] = form
        return form


def defaults(shape: tuple[int, ...], entry: ModelVersion) -> tuple[bool, Integers, Integers]:
    """Return whether the model takes queries of a shape, and their labels and windows if not given.

    Args:
        shape: of the pixels, [B, C, H, W].
        entry: served version; False where it is unloaded at the moment.
    """
    batch = shape[0]
    labels = one_each("labels", (), batch, none=-1)
    windows = one_each("windows", (), batch, none=0)
    if entry.loaded is None:
        return False, labels, windows
    query = Query(black(shape), _ANY_LEVEL.repeat(batch), labels, windows, ())
    try:
        entry.loaded.denoiser.check(query)
    except InvalidArgumentError:
        return False, labels, windows  # the engine raises it, once the rest was read
    return True, labels, windows


def black(shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return read-only zeros that take no memory, [B, C, H, W]."""
    return np.broadcast_to(np.float32(0), shape)


def field_head(number: int, size: int) -> bytes:
    """Return tag and length of a length-delimited field of ``size`` bytes, as protobuf writes them.

    See https://protobuf.dev/programming-guides/encoding/.
    """
    encoded = bytearray()
    for rest in (number << 3 | _LENGTH_DELIMITED, size):
        while rest > 0x7F:
            encoded.append(rest & 0x7F | 0x80)
            rest >>= 7
        encoded.append(rest)
    return bytes(encoded)


def check(entry: ModelVersion, query: Query) -> bool:
    """Check a query by its model, before its pixels are read; return whether the model is loaded.

    Raises:
        InvalidArgumentError: It does not fit the model.
    """
    if entry.loaded is None:
        return False
    entry.loaded.denoiser.check(query)
    return True
