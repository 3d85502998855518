"""Types of the client: arrays, and options of calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Required, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt


class SupportsArray(Protocol):
    """Array of another library, such as a tensor of torch on any device."""

    def __array__(self) -> npt.NDArray[Any]:
        """Return it as a numpy array."""
        ...


class SupportsDLPack(Protocol):
    """Array of another library that shares its memory by DLPack."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        """Return a capsule of its memory."""
        ...

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return type and number of the device."""
        ...


Images: TypeAlias = npt.NDArray[np.float32]
Pixels: TypeAlias = npt.NDArray[np.floating[Any] | np.uint8] | SupportsArray | SupportsDLPack
Levels: TypeAlias = float | Sequence[float] | npt.NDArray[np.floating[Any]] | SupportsArray
Integers: TypeAlias = int | Sequence[int] | npt.NDArray[np.integer[Any]] | SupportsArray
Sampler: TypeAlias = Literal[
    "ddim", "ddim_released", "ddpm", "heun", "euler", "dpmpp_2m", "pyramid"
]
Timesteps: TypeAlias = Literal["aligned", "folder"]
Want: TypeAlias = Literal["x", "denoised", "noise", "decoded"]
Conditions: TypeAlias = npt.NDArray[np.floating[Any]] | SupportsArray | SupportsDLPack


@dataclass(frozen=True, kw_only=True)
class Tls:
    """TLS options of a channel; ``Tls()`` uses the certificate authorities that gRPC trusts.

    Attributes:
        ca: PEM file of the certificate authorities of the server.
        certificate: PEM file of the client's certificate chain, for mutual TLS.
        key: PEM file of the client's private key.
        server_name: Name in the server's certificate, if not that of the target.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None


class QueryOptions(TypedDict, total=False):
    """Options of a query; see ``Client.denoise``."""

    model: Required[str]
    sigma: Levels | None
    alpha_bar: Levels | None
    time: Levels | None
    label: Integers | None
    window: Integers | None
    conditioning: Conditions | None
    unconditional: Conditions | None
    guidance: float | None
    priority: int | None
    timeout_s: float | None
    version: str | None


@dataclass(frozen=True, eq=False)
class Query:
    """One query of ``denoise_many``, with the arguments of ``Client.denoise``."""

    x: Pixels
    _: KW_ONLY
    model: str
    sigma: Levels | None = None
    alpha_bar: Levels | None = None
    time: Levels | None = None
    label: Integers | None = None
    window: Integers | None = None
    conditioning: Conditions | None = None
    unconditional: Conditions | None = None
    guidance: float | None = None
    priority: int | None = None
    timeout_s: float | None = None
    version: str | None = None


class SampleOptions(TypedDict, total=False):
    """Options of a trajectory; see ``Client.sample``."""

    model: Required[str]
    count: int
    seed: int
    steps: int | None
    sampler: Sampler
    label: Integers | None
    eta: float | None
    churn: float
    want: Collection[Want]
    window: Integers | None
    conditioning: Conditions | None
    unconditional: Conditions | None
    guidance: float | None
    priority: int | None
    version: str | None
    survive_breaks: bool
    explain_steps: Integers
    explain_top: int
    explain_images: int
    originality: bool | str
    window_scale: float | None
    timesteps: Timesteps | None
    start: Pixels | None
    start_time: float | None
    times: Sequence[float] | npt.NDArray[np.floating[Any]] | None
    first_image: int
    churn_min_sigma: float | None
    churn_max_sigma: float | None
    churn_noise: float | None
    size: tuple[int, int] | None
    tileable: bool
    symmetric: bool
    mask: Pixels | None


@dataclass
class Evidence:
    """Evidence of one ``x``, which a first product fills and further ones use: see ``Client.vjp``.

    Attributes:
        data: Opaque bytes of the server; empty before the first product, and for models whose
            products do not need it.
    """

    data: bytes = b""
