"""Configuration of ``kind: network``: the network and its execution, validated without pydantic.

Training and comparison read it with no packages but torch, numpy, safetensors and PyYAML.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from els_service.denoisers.base import BankInfo
from els_service.denoisers.engines.options import ENGINES, MAX_THREADS, EngineDefaults
from els_service.denoisers.levels import SCHEDULES
from els_service.denoisers.networks.parametrisation import PREDICTIONS
from els_service.errors import InvalidArgumentError, LoadError

ARCHITECTURES = ("resnet", "unet", "unet-attention")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
COMPILE_MODES = ("none", "default", "cuda-graphs")
MAX_BUCKET = 1024

_Check = tuple[str, Callable[[Any], bool]]
"""Description of the expected values, and a predicate."""


def _one_of(*values: str) -> _Check:
    return "one of " + ", ".join(values), lambda value: value in values


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _ints(description: str, low: int, high: int, lengths: range) -> _Check:
    def holds(value: object) -> bool:
        return (
            isinstance(value, tuple)
            and len(value) in lengths
            and all(_is_int(number, low, high) for number in value)
        )

    return description, holds


_FLAG: _Check = ("true or false", lambda value: isinstance(value, bool))
_DATA = {"fingerprint": str, "images": int, "source": str, "licence": str}
"""Keys of ``data``, which are fields of ``BankInfo``."""
_CHECKS: dict[str, _Check] = {
    "architecture": _one_of(*ARCHITECTURES),
    "shape": _ints("[C, H, W], each from 1 to 4096", 1, 4096, range(3, 4)),
    "widths": _ints("1 to 6 even numbers of channels up to 4096", 2, 4096, range(1, 7)),
    "blocks": ("1 to 64", lambda value: _is_int(value, 1, 64)),
    "padding": _one_of("zeros", "circular"),
    "label_count": ("0 to 100000", lambda value: _is_int(value, 0, 100_000)),
    "label_names": (
        "a list of strings",
        lambda value: isinstance(value, tuple) and all(isinstance(name, str) for name in value),
    ),
    "null_label": _FLAG,
    "prediction": _one_of(*PREDICTIONS),
    "sigma_data": (
        "0 < sigma_data <= 100",
        lambda value: isinstance(value, (int, float)) and value is not True and 0 < value <= 100,
    ),
    "schedule": _one_of(*SCHEDULES),
    "precision": _one_of(*PRECISIONS),
    "channels_last": _FLAG,
    "compile": _one_of(*COMPILE_MODES),
    "buckets": _ints(f"batch sizes from 1 to {MAX_BUCKET}", 1, MAX_BUCKET, range(33)),
    "deterministic": _FLAG,
    "clip": _FLAG,
    "engine": _one_of(*ENGINES),
    "threads": (
        f"1 to {MAX_THREADS}",
        lambda value: value is None or _is_int(value, 1, MAX_THREADS),
    ),
    "fallback": _FLAG,
}


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Architecture of a network, independent of where it runs.

    Raises:
        InvalidArgumentError: A field is out of range, or two fields are incompatible.
    """

    architecture: str
    shape: tuple[int, int, int]
    """(C, H, W)"""
    widths: tuple[int, ...]
    """Channels: one number for a resnet; one per resolution for a unet, each half the previous."""
    blocks: int = 6
    """Residual blocks of a resnet; its receptive field is 2·blocks + 5 pixels."""
    padding: str = "zeros"
    label_count: int = 0
    """0: unconditional."""
    label_names: tuple[str, ...] = ()
    null_label: bool = False
    """Whether a conditional network was also trained without a label (-1)."""
    prediction: str = "eps"
    sigma_data: float = 0.5
    """Standard deviation of the data, for prediction ``edm``."""
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_architecture(self)
        if len(self.label_names) not in (0, self.label_count):
            expected = f"none or {self.label_count} names"
            raise InvalidArgumentError("label_names", expected, len(self.label_names))
        if self.null_label and not self.label_count:
            raise InvalidArgumentError("null_label", "false for an unconditional network", "true")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Execution options of a network.

    Raises:
        InvalidArgumentError: A field is out of range, or two fields are incompatible.
    """

    precision: str = "float32"
    """Precision of weights and arithmetic; ``tf32`` is float32 with TF32 products on a GPU."""
    channels_last: bool = True
    compile: str = "none"
    """``default``: torch.compile; ``cuda-graphs``: its mode reduce-overhead."""
    buckets: tuple[int, ...] = ()
    """Batch sizes: a batch is padded to the next one, or split by the largest."""
    deterministic: bool = False
    """Same bits alone and in any batch; requires exactly one bucket."""
    clip: bool = False
    """Whether D is clipped to [-1, 1], the range of images, as by diffusers' ``clip_sample``."""
    engine: str = "torch"
    """One of ``ENGINES``: what computes the network on a CPU."""
    threads: int | None = None
    """Threads of OpenVINO; None for as many as torch has, whose number is the server's."""
    fallback: bool = True
    """Whether an engine or precision that the machine lacks is replaced; else the model is
    rejected."""

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.compile != "none" and self.engine not in ("torch", "compile"):
            raise InvalidArgumentError("compile", f"none beside engine {self.engine}", self.compile)
        if any(low >= high for low, high in zip(self.buckets, self.buckets[1:], strict=False)):
            raise InvalidArgumentError("buckets", "increasing numbers", list(self.buckets))
        if self.deterministic and len(self.buckets) > 1:
            raise InvalidArgumentError(
                "buckets", "one bucket where deterministic is true", list(self.buckets)
            )


@dataclass(frozen=True)
class NetworkDocument:
    """A whole ``model.yaml`` of ``kind: network``."""

    config: NetworkConfig
    execution: Execution
    data: BankInfo | None = None
    """Training data of the network, if the document names it."""


def parse_network(
    document: Mapping[str, Any], source: object, defaults: EngineDefaults | None = None
) -> NetworkDocument:
    """Return the document of a network from the content of its ``model.yaml``.

    Args:
        document: the mapping, with or without ``kind``. Execution options may also stand in a
            mapping ``execution``.
        source: the file, named in errors.
        defaults: of the server, for options that the document does not name.

    Raises:
        LoadError: A field is unknown, missing or out of range; names it.
    """
    content = _flat(document, source)
    values = {key: _tuples(value) for key, value in content.items() if key != "kind"}
    data = values.pop("data", None)
    known = _names(NetworkConfig) | _names(Execution)
    for name in values:
        if name not in known:
            raise LoadError(source, f"{name}: expected one of {', '.join(sorted(known))}, data")
    missing = [name for name in ("architecture", "shape", "widths") if name not in values]
    if missing:
        raise LoadError(source, f"{missing[0]}: expected a value, found none")
    try:
        return NetworkDocument(
            NetworkConfig(**{k: v for k, v in values.items() if k in _names(NetworkConfig)}),
            Execution(
                **_defaults(values, defaults or EngineDefaults())
                | {k: v for k, v in values.items() if k in _names(Execution)}
            ),
            None if data is None else _data(data),
        )
    except InvalidArgumentError as error:
        raise LoadError(source, str(error)) from error


def _flat(document: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Return a document with the options of its section ``execution`` beside the others."""
    section = document.get("execution", {})
    if not isinstance(section, Mapping):
        raise LoadError(source, f"execution: expected a mapping, got {section!r:.80}")
    known = _names(Execution)
    for name in section:
        if name not in known:
            raise LoadError(source, f"execution.{name}: expected one of {', '.join(sorted(known))}")
        if name in document:
            raise LoadError(source, f"{name}: expected once, got it in execution too")
    flat = {key: value for key, value in document.items() if key != "execution"}
    return flat | dict(section)


def _defaults(values: Mapping[str, Any], defaults: EngineDefaults) -> dict[str, Any]:
    """Return the server's options that a document permits."""
    if values.get("compile", "none") != "none":
        return {"fallback": defaults.fallback}
    return dataclasses.asdict(defaults)


def describe_network(document: NetworkDocument) -> dict[str, Any]:
    """Return the mapping that ``parse_network`` reads, without execution fields at defaults."""
    described: dict[str, Any] = {"kind": "network"}
    for part in (document.config, document.execution):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if part is document.config or value != field.default:
                described[field.name] = list(value) if isinstance(value, tuple) else value
    if document.data is not None:
        described["data"] = {name: getattr(document.data, name) for name in _DATA}
    return described


def _names(kind: type[NetworkConfig] | type[Execution]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_fields(part: NetworkConfig | Execution) -> None:
    for field in dataclasses.fields(part):
        expected, holds = _CHECKS[field.name]
        value = getattr(part, field.name)
        try:
            held = holds(value)
        except TypeError:  # an unhashable or incomparable value
            held = False
        if not held:
            raise InvalidArgumentError(field.name, expected, value)


def _check_architecture(config: NetworkConfig) -> None:
    if any(width % 2 for width in config.widths):
        raise InvalidArgumentError("widths", "even numbers", list(config.widths))
    if config.architecture == "resnet":
        if len(config.widths) != 1:
            raise InvalidArgumentError("widths", "one for a resnet", list(config.widths))
        return
    if config.blocks != 6:
        raise InvalidArgumentError("blocks", "none given for a unet", config.blocks)
    step = 2 ** (len(config.widths) - 1)
    if config.shape[1] % step or config.shape[2] % step:
        expected = f"height and width divisible by {step} for a unet of {len(config.widths)} widths"
        raise InvalidArgumentError("shape", expected, list(config.shape))


def _data(value: Any) -> BankInfo:
    if not isinstance(value, Mapping) or set(value) != set(_DATA):
        raise InvalidArgumentError("data", f"a mapping of {', '.join(_DATA)}", value)
    for name, kind in _DATA.items():
        if not isinstance(value[name], kind):
            raise InvalidArgumentError(f"data.{name}", kind.__name__, value[name])
        if kind is str and not value[name].isprintable():
            raise InvalidArgumentError(f"data.{name}", "printable text", ascii(value[name]))
    return BankInfo(**value)
