"""Conversion between numpy and messages: pure functions shared by both clients."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, SupportsIndex, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from els_client._types import (
    Bank,
    Conditioning,
    Conditions,
    FolderScheduler,
    Images,
    Integers,
    Levels,
    Limits,
    Model,
    Pixels,
    Query,
    Sampler,
    Sizes,
    Step,
    Timesteps,
    Want,
    WindowTable,
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
_SAMPLERS: dict[str, pb.Sampler.ValueType] = {
    "ddim": pb.SAMPLER_DDIM,
    "ddim_released": pb.SAMPLER_DDIM_RELEASED,
    "ddpm": pb.SAMPLER_DDPM,
    "heun": pb.SAMPLER_HEUN,
    "euler": pb.SAMPLER_EULER,
    "dpmpp_2m": pb.SAMPLER_DPMPP_2M,
    "pyramid": pb.SAMPLER_PYRAMID,
}
_TIMESTEPS: dict[str | None, pb.Timesteps.ValueType] = {
    None: pb.TIMESTEPS_UNSPECIFIED,
    "aligned": pb.TIMESTEPS_ALIGNED,
    "folder": pb.TIMESTEPS_FOLDER,
}
_STEPS = 20
_MAX_INT32 = 2**31 - 1

# Kinds of numpy dtypes.
_INTEGERS = "iu"
_REALS = "iuf"


def encode_tensor(x: Pixels, field: str = "x") -> pb.Tensor:
    """Return ``x`` [B, C, H, W] as a tensor; float64 is rounded to float32."""
    return _tensor(field, x, "[B, C, H, W]", _DTYPES.keys())


def encode_direction(field: str, direction: Pixels) -> pb.Tensor:
    """Return a cotangent or tangent [B, C, H, W] as a tensor; float64 is rounded to float32."""
    return _tensor(field, direction, "[B, C, H, W]", _FLOATS)


def _conditions(field: str, given: Conditions | None) -> pb.Tensor | None:
    """Return conditions [1 or B, T, W] as a tensor; None is omitted from the message."""
    return None if given is None else _tensor(field, given, "[1 or B, T, W]", _FLOATS)


def _array(field: str, given: Any) -> npt.NDArray[Any]:
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
        _refuse(field, "an array that numpy can read", f"{type(given).__name__}: {error}")
    _refuse(field, "a numpy array", type(given).__name__)


def _tensor(
    field: str,
    given: Pixels | Conditions,
    shape: str,
    dtypes: Collection[type[np.generic]],
) -> pb.Tensor:
    x = _array(field, given)
    if x.ndim != shape.count(",") + 1:
        _refuse(field, f"shape {shape}", f"shape {list(x.shape)}")
    if x.dtype.type not in dtypes:
        *others, last = sorted(dtype.__name__ for dtype in dtypes)
        _refuse(field, f"{', '.join(others)} or {last}", x.dtype)
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
        _refuse("level", "exactly one of sigma, alpha_bar and time", " and ".join(given) or "none")
    return pb.NoiseLevel(**{name: _listed(name, level, _REALS) for name, level in levels.items()})


@contextmanager
def _invalid_arguments() -> Iterator[None]:
    """Convert protobuf's errors for a value, such as a float for steps."""
    try:
        yield
    except InvalidArgumentError:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"request: {error}") from error


@_invalid_arguments()
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
        labels=_listed("label", query.label, _INTEGERS),
        windows=_listed("window", query.window, _INTEGERS),
        conditioning=_conditions("conditioning", query.conditioning),
        unconditional=_conditions("unconditional", query.unconditional),
        guidance=_guidance(query.guidance),
        return_log_evidence=return_log_evidence,
        priority=_priority(query.priority),
        version=query.version or "",
    )


@_invalid_arguments()
def encode_sample(
    *,
    model: str,
    count: int = 1,
    seed: int = 0,
    steps: int | None = None,
    sampler: Sampler = "ddim",
    label: Integers | None = None,
    eta: float | None = None,
    churn: float = 0.0,
    want: Collection[Want] = ("x", "denoised"),
    window: Integers | None = None,
    conditioning: Conditions | None = None,
    unconditional: Conditions | None = None,
    guidance: float | None = None,
    priority: int | None = None,
    version: str | None = None,
    survive_breaks: bool = False,
    explain_steps: Integers = (),
    explain_top: int = 8,
    explain_images: int = 0,
    originality: bool | str = False,
    window_scale: float | None = None,
    timesteps: Timesteps | None = None,
    start: Pixels | None = None,
    start_time: float | None = None,
    times: Levels | None = None,
    first_image: int = 0,
    churn_min_sigma: float | None = None,
    churn_max_sigma: float | None = None,
    churn_noise: float | None = None,
    size: tuple[int, int] | None = None,
    tileable: bool = False,
    symmetric: bool = False,
    mask: Pixels | None = None,
) -> pb.SampleRequest:
    """Return the request for ``count`` samples; None means the server's default."""
    if sampler not in _SAMPLERS:
        _refuse("sampler", f"one of {', '.join(_SAMPLERS)}", repr(sampler))
    if not set(want) <= set(get_args(Want)):
        _refuse("want", f"any of {', '.join(get_args(Want))}", repr(want))
    seed, count = _whole("seed", seed), _whole("count", count)
    if not 0 <= seed < 2**64:
        _refuse("seed", "0 to 2**64 - 1", seed)
    if count < 1:  # In the message 0 means 1.
        _refuse("count", "at least 1", count)
    if timesteps not in _TIMESTEPS:
        _refuse("timesteps", "'aligned' or 'folder'", repr(timesteps))
    if start_time is not None and start_time == 0:  # In the message 0 means none.
        _refuse("start_time", "0 < start_time <= 1", start_time)
    height, width = _sides(size)
    listed = _listed("times", times, _REALS)
    if times is not None and not listed:
        _refuse("times", "at least one", "none")
    if steps is None:
        steps = 0 if listed or sampler == "pyramid" else _STEPS
    steps, first_image = _whole("steps", steps), _whole("first_image", first_image)
    return pb.SampleRequest(
        model=model,
        count=count,
        seed=seed,
        steps=steps,
        sampler=_SAMPLERS[sampler],
        labels=_listed("label", label, _INTEGERS),
        windows=_listed("window", window, _INTEGERS),
        conditioning=_conditions("conditioning", conditioning),
        unconditional=_conditions("unconditional", unconditional),
        guidance=_guidance(guidance),
        eta=eta,
        churn=churn,
        return_x="x" in want,
        return_denoised="denoised" in want,
        return_noise="noise" in want,
        return_decoded="decoded" in want,
        priority=_priority(priority),
        version=version or "",
        return_resume_token=survive_breaks,
        **_explained(explain_steps, explain_top, explain_images),
        return_originality=bool(originality),
        window_scale=window_scale or 0.0,
        originality_model=originality if isinstance(originality, str) else "",
        timesteps=_TIMESTEPS[timesteps],
        start=None if start is None else encode_tensor(start, "start"),
        start_time=start_time or 0.0,
        times=listed,
        first_image=first_image,
        churn_min_sigma=churn_min_sigma,
        churn_max_sigma=churn_max_sigma,
        churn_noise=churn_noise,
        height=height,
        width=width,
        tileable=tileable,
        symmetric=symmetric,
        mask=None if mask is None else encode_tensor(mask, "mask"),
    )


def _sides(size: tuple[int, int] | None) -> tuple[int, int]:
    """Return height and width; 0, the model's own, for None."""
    if size is None:
        return 0, 0
    sides = [_whole("size", side) for side in size]
    if len(sides) != 2 or not all(1 <= side < 2**31 for side in sides):
        _refuse("size", "positive height and width", f"{size!r:.80}")
    return sides[0], sides[1]


def check_plain(query: Query) -> None:
    """Raise InvalidArgumentError if a query has a condition or guidance."""
    for field in ("conditioning", "unconditional", "guidance"):
        if getattr(query, field) is not None:
            _refuse(field, "none, as no model that explains takes it", "one")


def _explained(steps: Integers, top: int, images: int) -> dict[str, Any]:
    """Return the fields of a sample that explains some steps; none without steps."""
    # In the message 0 means 8.
    check_count("explain_top", top, least=1)
    check_count("explain_images", images, least=0)
    listed = _listed("explain_steps", steps, _INTEGERS)
    for step in listed:
        check_count("explain_steps", step, least=1)
    if not listed:
        return {}
    return {"explain_steps": listed, "explain_top": top, "explain_images": images}


def check_count(field: str, number: object, *, least: int) -> None:
    """Raise InvalidArgumentError unless a number is an int32 of at least ``least``."""
    if (
        isinstance(number, bool)
        or not isinstance(number, int | np.integer)
        or not least <= int(number)
    ):
        _refuse(field, f"an integer of at least {least}", f"{number!r:.80}")
    if int(number) > _MAX_INT32:
        _refuse(field, f"an integer of at most {_MAX_INT32}", f"{number!r:.80}")


def decode_tensor(tensor: pb.Tensor) -> Images:
    """Return a tensor as a writable float32 array."""
    if tensor.dtype != pb.DTYPE_F32 or len(tensor.data) != 4 * math.prod(tensor.shape):
        got = f"{pb.DType.Name(tensor.dtype)} {list(tensor.shape)} in {len(tensor.data)} bytes"
        raise error_of("INTERNAL", f"the server returned a malformed tensor: {got}")
    return np.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape)).astype(np.float32)


def decode_step(step: pb.SampleResponse) -> Step:
    """Return the step of a message."""
    return Step(
        index=step.index,
        total=step.total,
        alpha_bar=step.alpha_bar,
        _x=decode_tensor(step.x) if step.HasField("x") else None,
        _denoised=decode_tensor(step.denoised) if step.HasField("denoised") else None,
        _noise=decode_tensor(step.noise) if step.HasField("noise") else None,
        _decoded=decode_tensor(step.decoded) if step.HasField("decoded") else None,
        scale=step.scale,
        scales=max(1, step.scales),
    )


def decode_model(model: pb.Model) -> Model:
    """Return the description of a model."""
    window, bank, limits, wanted = model.window, model.bank, model.limits, model.conditioning
    decoded = model.decoded_shape
    return Model(
        name=model.name,
        kind=model.kind,
        machine=model.machine,
        padding=model.padding,
        channels=model.channels,
        height=model.height,
        width=model.width,
        window=WindowTable(tuple(window.sigma), tuple(window.k), window.max_k)
        if model.HasField("window")
        else None,
        schedule=model.schedule,
        label_count=model.label_count,
        label_names=tuple(model.label_names),
        limits=Limits(
            limits.max_images,
            limits.max_steps,
            limits.max_message_bytes,
            limits.min_sigma,
            limits.max_sigma,
            limits.max_pixels,
            limits.priority_levels,
            limits.max_in_flight_bytes,
        ),
        bank=Bank(
            bank.fingerprint,
            bank.images,
            bank.source,
            bank.licence,
            _decode_sizes(bank.sizes) if bank.HasField("sizes") else None,
        )
        if model.HasField("bank")
        else None,
        batch_invariant=model.batch_invariant,
        has_log_evidence=model.has_log_evidence,
        implementation=model.implementation,
        version=model.version,
        memory_bytes=model.memory_bytes,
        conditioning=Conditioning(wanted.max_rows, wanted.width)
        if model.HasField("conditioning")
        else None,
        decoded_shape=(decoded[0], decoded[1], decoded[2]) if decoded else None,
        step_seconds=model.step_seconds,
        scheduler=_decode_scheduler(model.scheduler) if model.HasField("scheduler") else None,
        label_guidance=model.label_guidance,
        has_gradients=model.has_gradients,
        has_sources=model.has_sources,
        has_originality=model.has_originality,
        fold=model.fold,
        sizes=_decode_sizes(model.sizes) if model.HasField("sizes") else None,
        scales=tuple((scale.height, scale.width) for scale in model.scales),
        scale_steps=model.scale_steps,
    )


def _decode_sizes(sizes: pb.Sizes) -> Sizes:
    return Sizes((sizes.min_height, sizes.max_height), (sizes.min_width, sizes.max_width))


def _decode_scheduler(scheduler: pb.FolderScheduler) -> FolderScheduler:
    names = {value: name for name, value in _SAMPLERS.items()}
    return FolderScheduler(
        name=scheduler.name,
        timestep_spacing=scheduler.timestep_spacing,
        steps_offset=scheduler.steps_offset,
        set_alpha_to_one=scheduler.set_alpha_to_one,
        clip_sample_range=scheduler.clip_sample_range or None,
        variance_type=scheduler.variance_type,
        use_karras_sigmas=scheduler.use_karras_sigmas,
        # A newer server may have further samplers.
        samplers=tuple(names[value] for value in scheduler.samplers if value in names),
    )


def _listed(field: str, values: Levels | Integers | None, kinds: str) -> list[Any]:
    """Return one or several values as the list of the message; None is empty."""
    if values is None:
        return []
    if isinstance(values, list | tuple):
        values = [getattr(value, "detach", lambda value=value: value)() for value in values]
    array = _array(field, values) if hasattr(values, "__array__") else np.asarray(values)
    # One value an image often has further axes, so that it broadcasts: [B, 1] or [B, 1, 1, 1].
    if array.ndim > 1 and array.size != array.shape[0]:
        _refuse(field, "one value or a list of them", f"shape {list(array.shape)}")
    if array.size and array.dtype.kind not in kinds:
        _refuse(field, "integers" if kinds == _INTEGERS else "numbers", f"{values!r}")
    return array.ravel().tolist()


def _whole(field: str, value: SupportsIndex) -> int:
    """Return an integer of any library's, such as a tensor of one number."""
    try:
        return operator.index(value)
    except TypeError:
        _refuse(field, "an integer", f"{value!r:.80}")


def _guidance(guidance: float | None) -> float:
    if guidance is None:
        return 0.0
    if guidance == 0:  # In the message 0 means 1.
        expected = "a number other than 0, which asks for the unconditional as conditioning alone"
        _refuse("guidance", expected, guidance)
    return guidance


def _priority(priority: int | None) -> int:
    if priority is None:
        return 0
    if priority < 1:
        _refuse("priority", "at least 1", priority)
    return priority


def _refuse(field: str, expected: str, got: object) -> NoReturn:
    description = f"expected {expected}, got {got}"
    raise InvalidArgumentError(f"{field}: {description}", [Violation(field, description)])
