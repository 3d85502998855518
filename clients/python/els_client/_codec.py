"""Conversion of arrays and queries to messages: pure functions shared by both clients."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, SupportsIndex, TypeVar

import numpy as np
import numpy.typing as npt

from els_client._types import (
    Conditions,
    Images,
    Integers,
    Levels,
    Pixels,
    Query,
)
from els_client.errors import InvalidArgumentError, Violation, error_of
from els_proto.denoise.v1 import denoise_pb2 as pb

_Query = TypeVar("_Query", pb.DenoiseRequest, pb.ScoreRequest)

# Scalar type of an array → type in the message, and its name in the contract.
_DTYPES: dict[type[np.generic], tuple[str, pb.DType.ValueType]] = {
    np.float64: ("<f4", pb.DTYPE_F32),
    np.float32: ("<f4", pb.DTYPE_F32),
    np.float16: ("<f2", pb.DTYPE_F16),
    np.uint8: ("u1", pb.DTYPE_U8),
}
_FLOATS = (np.float16, np.float32, np.float64)
_MAX_INT32 = 2**31 - 1

# Kinds of numpy dtypes.
INTEGERS = "iu"
REALS = "iuf"


def encode_tensor(x: Pixels, field: str = "x") -> pb.Tensor:
    """Return ``x`` [B, C, H, W] as a tensor; float64 is rounded to float32."""
    return _tensor(field, x, "[B, C, H, W]", _DTYPES.keys())


def encode_direction(field: str, direction: Pixels) -> pb.Tensor:
    """Return a cotangent or tangent [B, C, H, W] as a tensor; float64 is rounded to float32."""
    return _tensor(field, direction, "[B, C, H, W]", _FLOATS)


def conditions(field: str, given: Conditions | None) -> pb.Tensor | None:
    """Return conditions [1 or B, T, W] as a tensor; None is omitted from the message."""
    return None if given is None else _tensor(field, given, "[1 or B, T, W]", _FLOATS)


def array_of(field: str, given: Any) -> npt.NDArray[Any]:
    """Return a numpy array of any library's; lists and scalars are rejected.

    Tensors of torch are detached and copied from their device; bfloat16, which numpy has not,
    becomes float32. torch is not imported for it.
    """
    if isinstance(given, np.ndarray):
        return given
    array: npt.NDArray[Any]
    try:
        for method in ("detach", "cpu"):
            given = getattr(given, method, lambda given=given: given)()
        if str(getattr(given, "dtype", "")) == "torch.bfloat16":
            given = given.float()
        if hasattr(given, "__array__"):
            array = np.asarray(given)
            return array
        if hasattr(given, "__dlpack__"):
            array = np.from_dlpack(given)
            return array
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        refuse(field, "an array that numpy can read", f"{type(given).__name__}: {error}")
    refuse(field, "a numpy array", type(given).__name__)


def _tensor(
    field: str,
    given: Pixels | Conditions,
    shape: str,
    dtypes: Collection[type[np.generic]],
) -> pb.Tensor:
    x = array_of(field, given)
    if x.ndim != shape.count(",") + 1:
        refuse(field, f"shape {shape}", f"shape {list(x.shape)}")
    if x.dtype.type not in dtypes:
        *others, last = sorted(dtype.__name__ for dtype in dtypes)
        refuse(field, f"{', '.join(others)} or {last}", x.dtype)
    layout, dtype = _DTYPES[x.dtype.type]
    with np.errstate(over="ignore"):  # infinite beyond float32, which the server rejects
        data = x.astype(layout, copy=False).tobytes()
    return pb.Tensor(dtype=dtype, shape=x.shape, data=data)


def encode_level(
    sigma: Levels | None, alpha_bar: Levels | None, time: Levels | None
) -> pb.NoiseLevel:
    """Return the level message of the one given level."""
    levels = {"sigma": sigma, "alpha_bar": alpha_bar, "time": time}
    given = [name for name, level in levels.items() if level is not None]
    if len(given) != 1:
        refuse("level", "exactly one of sigma, alpha_bar and time", " and ".join(given) or "none")
    return pb.NoiseLevel(**{name: listed(name, level, REALS) for name, level in levels.items()})


@contextmanager
def invalid_arguments() -> Iterator[None]:
    """Convert protobuf's errors for a value, such as a float for steps."""
    try:
        yield
    except InvalidArgumentError:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"request: {error}") from error


@invalid_arguments()
def encode_query(
    request: type[_Query],
    query: Query,
    *,
    return_log_evidence: bool = False,
    level: pb.NoiseLevel | None = None,
) -> _Query:
    """Return the request of ``query`` without its deadline, which is that of the call.

    ``level`` takes the place of the query's.
    """
    return request(
        model=query.model,
        x=encode_tensor(query.x),
        level=level or encode_level(query.sigma, query.alpha_bar, query.time),
        labels=listed("label", query.label, INTEGERS),
        windows=listed("window", query.window, INTEGERS),
        conditioning=conditions("conditioning", query.conditioning),
        unconditional=conditions("unconditional", query.unconditional),
        guidance=guidance_of(query.guidance),
        return_log_evidence=return_log_evidence,
        priority=priority_of(query.priority),
        version=query.version or "",
    )


def check_plain(query: Query) -> None:
    """Raise InvalidArgumentError if a query has a condition or guidance."""
    for field in ("conditioning", "unconditional", "guidance"):
        if getattr(query, field) is not None:
            refuse(field, "none, as no model that explains takes it", "one")


def check_count(field: str, number: object, *, least: int) -> None:
    """Raise InvalidArgumentError unless a number is an int32 of at least ``least``."""
    if (
        isinstance(number, bool)
        or not isinstance(number, int | np.integer)
        or not least <= int(number)
    ):
        refuse(field, f"an integer of at least {least}", f"{number!r:.80}")
    if int(number) > _MAX_INT32:
        refuse(field, f"an integer of at most {_MAX_INT32}", f"{number!r:.80}")


def decode_tensor(tensor: pb.Tensor) -> Images:
    """Return a tensor as a writable float32 array."""
    if tensor.dtype != pb.DTYPE_F32 or len(tensor.data) != 4 * math.prod(tensor.shape):
        got = f"{pb.DType.Name(tensor.dtype)} {list(tensor.shape)} in {len(tensor.data)} bytes"
        raise error_of("INTERNAL", f"the server returned a malformed tensor: {got}")
    return np.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape)).astype(np.float32)


def listed(field: str, values: Levels | Integers | None, kinds: str) -> list[Any]:
    """Return one or several values as the list of the message; None is empty."""
    if values is None:
        return []
    if isinstance(values, list | tuple):
        values = [getattr(value, "detach", lambda value=value: value)() for value in values]
    array = array_of(field, values) if hasattr(values, "__array__") else np.asarray(values)
    # One value an image often has further axes, so that it broadcasts: [B, 1] or [B, 1, 1, 1].
    if array.ndim > 1 and array.size != array.shape[0]:
        refuse(field, "one value or a list of them", f"shape {list(array.shape)}")
    if array.size and array.dtype.kind not in kinds:
        refuse(field, "integers" if kinds == INTEGERS else "numbers", f"{values!r}")
    return array.ravel().tolist()


def whole(field: str, value: SupportsIndex) -> int:
    """Return an integer of any library's, such as a tensor of one number."""
    try:
        return operator.index(value)
    except TypeError:
        refuse(field, "an integer", f"{value!r:.80}")


def guidance_of(guidance: float | None) -> float:
    """Return guidance as in the message."""
    if guidance is None:
        return 0.0
    if guidance == 0:  # In the message 0 means 1.
        expected = "a number other than 0, which asks for the unconditional as conditioning alone"
        refuse("guidance", expected, guidance)
    return guidance


def priority_of(priority: int | None) -> int:
    """Return a priority as in the message."""
    if priority is None:
        return 0
    if priority < 1:
        refuse("priority", "at least 1", priority)
    return priority


def refuse(field: str, expected: str, got: object) -> NoReturn:
    """Raise InvalidArgumentError for a field."""
    description = f"expected {expected}, got {got}"
    raise InvalidArgumentError(f"{field}: {description}", [Violation(field, description)])
