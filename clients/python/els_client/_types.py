"""Types of the client: arrays, queries, models and steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Required, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from els_client._explanation import Explanation
    from els_client._originality import Originality


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


@dataclass(frozen=True)
class WindowTable:
    """Window of a model by noise level: linear in log σ, rounded to odd, constant beyond the ends.

    Attributes:
        sigma: Increasing noise levels, s/a.
        k: Odd side of the window in pixels, one for each sigma.
        max_k: Largest window of a request.
    """

    sigma: tuple[float, ...]
    k: tuple[int, ...]
    max_k: int


@dataclass(frozen=True)
class Bank:
    """Training images of an analytic model.

    Attributes:
        fingerprint: SHA-256 of the content, hexadecimal.
        images: Number of images.
        source: Origin of the images.
        licence: Licence of the images.
    """

    fingerprint: str
    images: int
    source: str
    licence: str
    sizes: Sizes | None = None
    """Of the images, if they have several sizes; else all have the shape of the model."""


@dataclass(frozen=True)
class Conditioning:
    """Shape of a model's condition for each image: [1 to ``max_rows``, ``width``] numbers."""

    max_rows: int
    width: int


@dataclass(frozen=True)
class FolderScheduler:
    """Scheduler in the folder of a diffusers or latent model, for ``timesteps="folder"``.

    Attributes:
        name: Class of diffusers.
        timestep_spacing: "leading", "linspace" or "trailing".
        steps_offset: Timesteps that "leading" adds.
        set_alpha_to_one: Whether ddim ends at ᾱ = 1, not at that of timestep 0.
        clip_sample_range: Range to which ddim and ddpm clip D; None if they do not.
        variance_type: Variance of ddpm's noise, as in diffusers.
        use_karras_sigmas: Whether euler and dpmpp_2m visit the levels of Karras et al.
        samplers: Samplers that support ``timesteps="folder"``.
    """

    name: str
    timestep_spacing: str
    steps_offset: int
    set_alpha_to_one: bool
    clip_sample_range: float | None
    variance_type: str
    use_karras_sigmas: bool
    samplers: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """Sizes of images: smallest and largest side of each axis."""

    height: tuple[int, int]
    width: tuple[int, int]

    def __contains__(self, size: tuple[int, int]) -> bool:
        """Return whether images of a height and width are among them."""
        (low, high), (wide_low, wide_high) = self.height, self.width
        return low <= size[0] <= high and wide_low <= size[1] <= wide_high


@dataclass(frozen=True)
class Limits:
    """Limits of one call; ``min_sigma`` and ``max_sigma`` bound s/a of any noise level.

    ``max_in_flight_bytes`` is the limit of all callers together; 0 if the server does not report
    it.
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
        name: Name in calls.
        kind: "analytic", "gaussian", "wiener", "network", "diffusers", "onnx", "latent" or
            "picture".
        machine: "ideal", "local", "equivariant" or "els" for analytic models; for networks their
            architecture; otherwise empty.
        padding: "zeros", "circular", "valid" or "inside" for analytic models; otherwise empty.
        channels: Channels C of its images.
        height: Height H of its images.
        width: Width W of its images.
        window: Window by noise level; None if it cannot be chosen.
        schedule: "cosine": ᾱ(t) = cos²(π t / (2·1.008)); "timesteps": those at which the network
        was
            trained at.
        label_count: Labels are 0 … label_count-1; 0 means unconditional.
        label_names: Empty, or one name for each label.
        limits: Limits of one call.
        bank: Training images; None for models without a bank.
        batch_invariant: Whether an image has the same bits alone and in any batch, on one device
            and implementation; if not, results and samples differ by rounding.
        has_log_evidence: Whether ``denoise_with_evidence`` is supported.
        implementation: Implementation of patch attention; empty if none is used.
        version: Decimal integer.
        memory_bytes: Approximate memory while loaded.
        conditioning: Condition that every query requires; None for models without conditioning.
        decoded_shape: (C, H, W) of the decoded images of a latent model; otherwise None.
        step_seconds: Predicted seconds for one step of one image, averaged over a sample of 20
            steps; 0 if unknown.
        scheduler: Scheduler of a diffusers folder; otherwise None.
        label_guidance: Whether ``guidance`` applies to labels.
        has_gradients: Whether ``vjp`` and ``jvp`` are supported.
        has_sources: Whether ``explain`` is supported.
        fold: ρ with which whole mean patches overlap, 0.05 to infinity; 0: their centres alone.
        sizes: Heights and widths that it answers; None: its own only.
        scales: (height, width) of the first picture at each scale, coarsest first, for models of
            kind "picture", whose labels are the scales; otherwise empty.
        scale_steps: Default steps of each scale for the sampler pyramid; 0 without scales.
        has_originality: Whether ``originality`` is supported: it holds the images of its bank.
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
    scheduler: FolderScheduler | None = None
    label_guidance: bool = False
    has_gradients: bool = False
    has_sources: bool = False
    fold: float = 0.0
    sizes: Sizes | None = None
    scales: tuple[tuple[int, int], ...] = ()
    scale_steps: int = 0
    has_originality: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of its images."""
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class RepositoryModel:
    """A model of a server's repository, served or not.

    Attributes:
        name: Name in calls.
        version: Decimal integer.
        state: "READY", "LOADING" or "UNAVAILABLE".
        reason: Reason why it is not ready; otherwise empty.
    """

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True)
class Statistics:
    """Statistics of a model since it was loaded.

    Attributes:
        name: Name of the model.
        version: Decimal integer.
        images: Computed images.
        batches: Computed batches.
        answered: Successful requests.
        failed: Failed requests.
        queued_s: Total seconds of requests in the queue.
        computed_s: Total seconds of computation of requests.
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
        total: Number of steps.
        alpha_bar: ᾱ of ``x``; increases to 1, by pyramid within each scale.
        scale: Scale of ``x`` and ``denoised``, whose size is that of the scale; 0, the coarsest,
            for other samplers than pyramid.
        scales: Number of scales; 1 for other samplers.
    """

    index: int
    total: int
    alpha_bar: float
    _x: Images | None
    _denoised: Images | None
    _noise: Images | None = None
    _decoded: Images | None = None
    _explanation: Explanation | None = None
    scale: int = 0
    scales: int = 1
    _originality: tuple[Originality, ...] = ()

    @property
    def x(self) -> Images:
        """State after this step, float32 [count, C, H, W].

        Raises:
            AttributeError: Not requested, and this is not the last step.
        """
        return _wanted("x", self._x)

    @property
    def denoised(self) -> Images:
        """D(x) used by this step, float32 [count, C, H, W].

        Raises:
            AttributeError: Not requested, and this is not the last step.
        """
        return _wanted("denoised", self._denoised)

    @property
    def noise(self) -> Images:
        """Initial standard normal noise of the trajectory, float32 [count, C, H, W].

        Raises:
            AttributeError: Not requested, or this is not the first step.
        """
        return _wanted("noise", self._noise)

    @property
    def decoded(self) -> Images:
        """Images in [-1, 1] of a latent model's ``x``: float32 [count, *Model.decoded_shape].

        Raises:
            AttributeError: Not requested, or this is not the last step.
        """
        return _wanted("decoded", self._decoded)

    @property
    def explanation(self) -> Explanation:
        """Where the first D(x) of this step came from, as ``Client.explain`` returns it.

        Raises:
            AttributeError: Not requested for this step.
        """
        if self._explanation is None:
            hint = f"request it with explain_steps=[{self.index}]"
            raise AttributeError(f"this step has no explanation: {hint}")
        return self._explanation

    @property
    def originality(self) -> tuple[Originality, ...]:
        """Report of each image of the last step, as ``Client.originality`` returns them.

        Raises:
            AttributeError: Not requested, or this is not the last step.
        """
        if not self._originality:
            hint = "request them with originality=True; only the last step has them"
            raise AttributeError(f"this step has no reports of originality: {hint}")
        return self._originality

    def __repr__(self) -> str:
        return f"Step({self.index} of {self.total}, alpha_bar={self.alpha_bar:.4g})"


def _wanted(name: str, images: Images | None) -> Images:
    if images is None:
        raise AttributeError(f"this step has no {name}: request it with want=({name!r},)")
    return images
