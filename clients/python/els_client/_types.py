"""What the client takes and gives: arrays, models and steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal, Required, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

Images: TypeAlias = npt.NDArray[np.float32]
Pixels: TypeAlias = npt.NDArray[np.floating[Any] | np.uint8]
Levels: TypeAlias = float | Sequence[float] | npt.NDArray[np.floating[Any]]
Integers: TypeAlias = int | Sequence[int] | npt.NDArray[np.integer[Any]]
Sampler: TypeAlias = Literal["ddim", "ddim_released", "ddpm", "heun"]
Want: TypeAlias = Literal["x", "denoised", "noise", "decoded"]
Conditions: TypeAlias = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Tls:
    """How a channel is encrypted; of ``Tls()`` alone, with the authorities that gRPC trusts.

    Attributes:
        ca: PEM file of the authorities that may vouch for the server.
        certificate: PEM file of the client's own certificate chain, for mutual TLS.
        key: PEM file of its private key.
        server_name: Name that the server's certificate must bear, if not the target's.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None


class QueryOptions(TypedDict, total=False):
    """What may be said of images in a question; ``Client.denoise`` explains it."""

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
    """One question of many, for ``denoise_many``: the arguments of ``Client.denoise``."""

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
    """What may be said of a trajectory; ``Client.sample`` explains it."""

    model: Required[str]
    count: int
    seed: int
    steps: int
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


@dataclass(frozen=True)
class WindowTable:
    """The window that a model takes at a noise level: linear in log σ, rounded to odd, ends held.

    Attributes:
        sigma: Increasing noise levels, s/a.
        k: Odd side of the window in pixels, one for each sigma.
        max_k: Largest window that a request may ask for.
    """

    sigma: tuple[float, ...]
    k: tuple[int, ...]
    max_k: int


@dataclass(frozen=True)
class Bank:
    """The training images that an analytic model answers from.

    Attributes:
        fingerprint: SHA-256 of the content, hexadecimal.
        images: How many there are.
        source: Where they come from.
        licence: Under which terms.
    """

    fingerprint: str
    images: int
    source: str
    licence: str


@dataclass(frozen=True)
class Conditioning:
    """What a model wants to be told of each image: [1 to ``max_rows``, ``width``] numbers."""

    max_rows: int
    width: int


@dataclass(frozen=True)
class Limits:
    """What one call may ask for; ``min_sigma`` and ``max_sigma`` bound s/a of any noise level.

    ``max_in_flight_bytes`` bounds what all callers have in flight together; 0 where the server does
    not say.
    """

    max_images: int
    max_steps: int
    max_message_bytes: int
    min_sigma: float
    max_sigma: float
    max_pixels: int
    priority_levels: int
    max_in_flight_bytes: int = 0


@dataclass(frozen=True)
class Model:
    """A model's description.

    Attributes:
        name: What calls name it by.
        kind: "analytic", "gaussian", "wiener", "network", "diffusers", "onnx" or "latent".
        machine: Of analytic models "ideal", "local", "equivariant" or "els"; of networks their
            architecture; else empty.
        padding: Of analytic models "zeros", "circular" or "valid"; else empty.
        channels: C of its images.
        height: H of its images.
        width: W of its images.
        window: None where there is none to choose.
        schedule: "cosine": ᾱ(t) = cos²(π t / (2·1.008)); "timesteps": those that the network was
            trained at.
        label_count: Labels are 0 … label_count-1; 0 means unconditional.
        label_names: Empty, or one name a label.
        limits: What one call may ask for.
        bank: None where there is none.
        batch_invariant: Whether an image has the same bits alone and in any batch, on one device
            and implementation; if not, results and samples differ by rounding.
        has_log_evidence: Whether ``denoise_with_evidence`` is answered.
        implementation: Which patch attention answers; empty where none is used.
        version: A whole number, written in decimal.
        memory_bytes: About how much memory it takes while loaded.
        conditioning: None where it takes none; else every question needs one.
        decoded_shape: (C, H, W) of the images that a latent model's latents decode to; else None.
        step_seconds: Seconds that the server predicts for one step of one image, averaged over a
            sample of 20 steps; 0 where it does not know.
    """

    name: str
    kind: str
    machine: str
    padding: str
    channels: int
    height: int
    width: int
    window: WindowTable | None
    schedule: str
    label_count: int
    label_names: tuple[str, ...]
    limits: Limits
    bank: Bank | None
    batch_invariant: bool
    has_log_evidence: bool
    implementation: str
    version: str
    memory_bytes: int
    conditioning: Conditioning | None = None
    decoded_shape: tuple[int, int, int] | None = None
    step_seconds: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images it takes."""
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class RepositoryModel:
    """A model of a server's repository, served or not.

    Attributes:
        name: What calls name it by.
        version: A whole number, written in decimal.
        state: "READY", "LOADING" or "UNAVAILABLE".
        reason: Why it is not ready; else empty.
    """

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True)
class Statistics:
    """What was asked of a model since it was loaded.

    Attributes:
        name: Name of the model.
        version: A whole number, written in decimal.
        images: Images that were computed.
        batches: Launches that computed them.
        answered: Requests that were answered.
        failed: Requests that were not.
        queued_s: Seconds that requests waited, in all.
        computed_s: Seconds that they were computed, in all.
    """

    name: str
    version: str
    images: int
    batches: int
    answered: int
    failed: int
    queued_s: float
    computed_s: float


@dataclass(frozen=True, eq=False, repr=False)
class Step:
    """One step of a trajectory; on the last ``x`` and ``denoised`` are both the result.

    Attributes:
        index: From 1 to ``total``.
        total: How many steps there are.
        alpha_bar: ᾱ at which ``x`` stands; rises to 1.
    """

    index: int
    total: int
    alpha_bar: float
    _x: Images | None
    _denoised: Images | None
    _noise: Images | None = None
    _decoded: Images | None = None

    @property
    def x(self) -> Images:
        """State after this step, float32 [count, C, H, W].

        Raises:
            AttributeError: It was not wanted, and this is not the last step.
        """
        return _wanted("x", self._x)

    @property
    def denoised(self) -> Images:
        """D(x) that this step was taken with, float32 [count, C, H, W].

        Raises:
            AttributeError: It was not wanted, and this is not the last step.
        """
        return _wanted("denoised", self._denoised)

    @property
    def noise(self) -> Images:
        """Standard normal noise that the trajectory started from, float32 [count, C, H, W].

        Raises:
            AttributeError: It was not wanted, or this is not the first step.
        """
        return _wanted("noise", self._noise)

    @property
    def decoded(self) -> Images:
        """Images in [-1, 1] of a latent model's ``x``: float32 [count, *Model.decoded_shape].

        Raises:
            AttributeError: They were not wanted, or this is not the last step.
        """
        return _wanted("decoded", self._decoded)

    def __repr__(self) -> str:
        return f"Step({self.index} of {self.total}, alpha_bar={self.alpha_bar:.4g})"


def _wanted(name: str, images: Images | None) -> Images:
    if images is None:
        raise AttributeError(f"this step carries no {name}: ask for it with want=({name!r},)")
    return images
