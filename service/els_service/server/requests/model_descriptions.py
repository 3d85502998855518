"""Encoding of the description of a served model."""

from __future__ import annotations

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import SizeRange
from els_service.denoisers.folder_scheduler import FolderScheduler
from els_service.denoisers.levels import MAX_SIGMA, MIN_SIGMA
from els_service.engine.model_versions import ModelVersion
from els_service.engine.request_context import PRIORITIES
from els_service.errors import shortened

_LONGEST_REASON = 1000
"""Maximum characters of the reason for an engine, which may quote a compiler."""


def encode_model(served: ModelVersion, limits: Limits) -> pb.Model:
    """Return the description of a served version of a model."""
    info = served.info
    channels, height, width = info.shape
    bank, window = info.bank, info.window
    return pb.Model(
        name=served.model,
        version=str(served.version),
        kind=info.kind,
        machine=info.machine,
        padding=info.padding,
        channels=channels,
        height=height,
        width=width,
        window=None
        if window is None
        else pb.WindowTable(sigma=window.sigma, k=window.k, max_k=info.max_window),
        schedule=info.schedule,
        label_count=info.label_count,
        label_names=info.label_names,
        limits=pb.Limits(
            max_images=limits.max_images,
            max_steps=limits.max_steps,
            max_message_bytes=limits.max_message_bytes,
            min_sigma=MIN_SIGMA,
            max_sigma=MAX_SIGMA,
            max_pixels=limits.max_pixels,
            priority_levels=PRIORITIES,
            max_in_flight_bytes=limits.max_in_flight_bytes,
        ),
        bank=None
        if bank is None
        else pb.Bank(
            fingerprint=bank.fingerprint,
            images=bank.images,
            source=bank.source,
            licence=bank.licence,
            sizes=None if bank.sizes is None else _encode_sizes(bank.sizes),
        ),
        batch_invariant=info.batch_invariant,
        has_log_evidence=info.has_log_evidence,
        has_gradients=info.has_gradients,
        has_sources=info.has_sources,
        has_originality=info.has_originality,
        implementation=info.implementation,
        memory_bytes=info.memory_bytes,
        conditioning=pb.Conditioning(max_rows=info.condition_rows, width=info.condition_width)
        if info.condition_width
        else None,
        decoded_shape=info.decoded_shape,
        step_seconds=0.0 if served.loaded is None else served.loaded.step_s,
        scheduler=None if info.scheduler is None else _encode_scheduler(info.scheduler),
        label_guidance=info.label_guidance,
        fold=info.fold,
        sizes=None if info.sizes is None else _encode_sizes(info.sizes),
        scales=[pb.Scale(height=height, width=width) for height, width in info.scales],
        scale_steps=info.scale_steps,
        engine=info.engine,
        engine_reason=shortened(info.engine_reason, _LONGEST_REASON),
        precision=info.precision,
        precision_error=info.precision_error,
    )


def _encode_sizes(sizes: SizeRange) -> pb.Sizes:
    return pb.Sizes(
        min_height=sizes.height[0],
        max_height=sizes.height[1],
        min_width=sizes.width[0],
        max_width=sizes.width[1],
    )


def _encode_scheduler(scheduler: FolderScheduler) -> pb.FolderScheduler:
    return pb.FolderScheduler(
        name=scheduler.name,
        timestep_spacing=scheduler.spacing,
        steps_offset=scheduler.steps_offset,
        set_alpha_to_one=scheduler.set_alpha_to_one,
        clip_sample_range=scheduler.clip or 0.0,
        variance_type=scheduler.variance_type,
        use_karras_sigmas=scheduler.karras,
        samplers=[pb.Sampler.Value(f"SAMPLER_{name.upper()}") for name in scheduler.samplers],
    )
