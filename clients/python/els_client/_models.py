"""Descriptions of models, and of the models of a repository."""

from __future__ import annotations

from dataclasses import dataclass


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
        kind: "analytic", "gaussian", "wiener", "pca", "smoothed", "network", "diffusers", "onnx",
            "latent" or "picture".
        machine: "ideal", "local", "equivariant" or "els" for analytic models; for networks their
            architecture; otherwise empty.
        padding: "zeros", "circular", "valid" or "inside" for analytic models; otherwise empty.
        channels: Channels C of its images.
        height: Height H of its images.
        width: Width W of its images.
        window: Window by noise level; None if it cannot be chosen.
        schedule: "cosine": ᾱ(t) = cos²(π t / (2·1.008)); "timesteps": those that the
            network was trained at.
        label_count: Labels are 0 … label_count-1; 0 means unconditional.
        label_names: Empty, or one name for each label.
        limits: Limits of one call.
        bank: Training images; None for models without a bank.
        batch_invariant: Whether an image has the same bits alone and in any batch, on one device
            and implementation; if not, results and samples differ by rounding.
        has_log_evidence: Whether ``denoise_with_evidence`` is supported.
        implementation: What the bits of an answer depend on: the implementation of patch attention,
            or of a network; empty if none is used.
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
        engine: Trained networks: "torch", "compile", "onnxruntime" or "openvino", or several of
            these joined by "+", of small batches first; otherwise empty.
        engine_reason: Why engine and precision are not what the server's configuration asks for,
            or why they were chosen; otherwise empty.
        precision: Precision of a trained network's arithmetic; otherwise empty.
        precision_error: Relative error of a trained network's output against its own engine in
            float32, measured when it was loaded; 0 for that engine in float32.
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
    engine: str = ""
    engine_reason: str = ""
    precision: str = ""
    precision_error: float = 0.0

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
