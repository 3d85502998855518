"""Descriptions of models from messages."""

from __future__ import annotations

from els_client._models import (
    Bank,
    Conditioning,
    FolderScheduler,
    Limits,
    Model,
    Sizes,
    WindowTable,
)
from els_client._sample_codec import SAMPLERS
from els_proto.denoise.v1 import denoise_pb2 as pb


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
        engine=model.engine,
        engine_reason=model.engine_reason,
        precision=model.precision,
        precision_error=model.precision_error,
    )


def _decode_sizes(sizes: pb.Sizes) -> Sizes:
    return Sizes((sizes.min_height, sizes.max_height), (sizes.min_width, sizes.max_width))


def _decode_scheduler(scheduler: pb.FolderScheduler) -> FolderScheduler:
    names = {value: name for name, value in SAMPLERS.items()}
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
