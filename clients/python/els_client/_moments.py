"""Jacobian products and explanations: conversion between numpy and messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from els_client import _codec as codec
from els_client import _sample_codec as sample_codec
from els_client._explanation import Explanation
from els_client._originality import decode_originality
from els_client._step import Step
from els_client._types import Evidence, Images, Pixels, Query
from els_client.errors import error_of
from els_proto.denoise.v1 import denoise_pb2 as pb

_Product = TypeVar("_Product", pb.VjpRequest, pb.JvpRequest)


def encode_product(
    request: type[_Product],
    query: Query,
    field: str,
    given: Pixels,
    evidence: Evidence | None,
) -> _Product:
    """Return the request for a product with ``given``, the cotangent or tangent."""
    base = codec.encode_query(pb.DenoiseRequest, query)
    message = request(
        model=base.model,
        x=base.x,
        level=base.level,
        labels=base.labels,
        windows=base.windows,
        conditioning=base.conditioning if base.HasField("conditioning") else None,
        unconditional=base.unconditional if base.HasField("unconditional") else None,
        guidance=base.guidance,
        priority=base.priority,
        version=base.version,
        evidence=b"" if evidence is None else evidence.data,
        return_evidence=evidence is not None,
    )
    getattr(message, field).CopyFrom(codec.encode_direction(field, given))
    return message


def keep_evidence(evidence: Evidence | None, answer: pb.VjpResponse | pb.JvpResponse) -> None:
    """Keep the evidence of a response, unless that of the request was used."""
    if evidence is not None and answer.evidence:
        evidence.data = answer.evidence


def encode_explain(query: Query, top: int, images: int) -> pb.ExplainRequest:
    """Return the request to explain a query with ``top`` sources, and bank images."""
    # In the message 0 means 8.
    codec.check_count("top", top, least=1)
    codec.check_count("images", images, least=0)
    codec.check_plain(query)
    base = codec.encode_query(pb.DenoiseRequest, query)
    return pb.ExplainRequest(
        model=base.model,
        x=base.x,
        level=base.level,
        labels=base.labels,
        windows=base.windows,
        top=int(top),
        return_images=int(images),
        priority=base.priority,
        version=base.version,
    )


def decode_explanation(messages: Sequence[pb.ExplainResponse], count: int) -> Explanation:
    """Return the explanation of all ``count`` images of a request, one message each."""
    if [message.index for message in messages] != list(range(count)):
        got = [message.index for message in messages]
        raise error_of("INTERNAL", f"the server explained images {got} of {count}")
    weights = _together(messages, "weights")
    shape = (*weights.shape[1:], 3)
    sources = [_integers(message.sources).reshape(shape) for message in messages]
    shares = np.zeros((len(messages), messages[0].bank_images))
    labels = np.full(messages[0].bank_images, -1)
    sizes = np.full((messages[0].bank_images if messages[0].share_sizes else 0, 2), -1)
    images: list[dict[int, Images]] = []
    file_names: dict[int, str] = {}
    for row, message in zip(shares, messages, strict=True):
        numbers = _integers(message.share_images)
        row[numbers] = codec.decode_tensor(message.shares)
        if message.share_labels:
            labels[numbers] = _integers(message.share_labels)
        if message.share_sizes:
            # One for all if they have one size.
            sizes[numbers] = _integers(message.share_sizes).reshape(-1, 2)
        images.append(dict(zip(numbers.tolist(), _bank_images(message), strict=False)))
        file_names.update(zip(numbers.tolist(), message.file_names, strict=False))
    return Explanation(
        denoised=_together(messages, "denoised"),
        variance=_together(messages, "variance"),
        entropy=_together(messages, "entropy"),
        sources=np.stack(sources),
        weights=weights,
        shares=shares,
        dropped_share=np.array([message.dropped_share for message in messages]),
        labels=labels,
        label_names=tuple(messages[0].label_names),
        bank_fingerprint=messages[0].bank_fingerprint,
        images=tuple(images),
        file_names=file_names,
        image_sizes=sizes,
    )


def decode_step(message: pb.SampleResponse) -> Step:
    """Return the step of a message, with its explanation and reports if it has some."""
    step = sample_codec.decode_step(message)
    if message.originality:
        reports = decode_originality(message.originality, len(message.originality))
        step = replace(step, _originality=reports)
    if not message.explanations:
        return step
    explanation = decode_explanation(message.explanations, len(message.explanations))
    return replace(step, _explanation=explanation)


def _bank_images(message: pb.ExplainResponse) -> Iterable[Images]:
    """Return the bank images of a message, [C, H, W] each; of a mixed bank each of its own size."""
    if message.sized_images:
        return [codec.decode_tensor(one)[0] for one in message.sized_images]
    return codec.decode_tensor(message.images) if message.HasField("images") else ()


def _together(messages: Sequence[pb.ExplainResponse], field: str) -> Images:
    return np.concatenate([codec.decode_tensor(getattr(message, field)) for message in messages])


def _integers(data: bytes) -> npt.NDArray[np.int64]:
    return np.frombuffer(data, "<i4").astype(np.int64)
