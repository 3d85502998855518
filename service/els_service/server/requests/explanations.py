"""Requests for explanations, of ``Explain`` and ``Sample``, and their messages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from els_kernels import MAX_SOURCES
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo, Query, make_query
from els_service.denoisers.explanations import Explanation
from els_service.engine.model_versions import ModelVersion
from els_service.engine.registry import ModelRegistry
from els_service.errors import InvalidArgumentError, ResourceExhaustedError, UnsupportedError
from els_service.server.requests import forms, tensors

DEFAULT_SOURCES = 8
MAX_SHARES = 1 << 16
"""Most bank images whose shares a message names."""
MAX_NAMES = 4096
"""Most bank images whose files a message names."""
MAX_IMAGES = 16
"""Most bank images that a message has."""
_LISTED = 20
"""Models that an error lists."""
_FIELD_BYTES = 3
"""Bytes of tag and length of a name, which has less than 16 KiB."""


@dataclass(frozen=True)
class Detail:
    """Optional content of an explanation beside the statistics of each pixel.

    Attributes:
        top: number of sources of each pixel, 1 to ``MAX_SOURCES``.
        images: number of bank images of largest share, 0 to ``MAX_IMAGES``.
    """

    top: int
    images: int


def check_sources(served: ModelVersion, models: ModelRegistry, field: str = "") -> None:
    """Check that a model has sources.

    Args:
        served: the model.
        models: registry; an error lists those of its models that have sources.
        field: of a request that is valid without it; empty for ``Explain``, which is not.

    Raises:
        InvalidArgumentError: It has none, and the field asks for what needs them.
        UnsupportedError: It has none, and there is no field.
    """
    if served.info.has_sources:
        return
    able = [each.model for each in models.newest() if each.info.has_sources]
    more = ["…"] if len(able) > _LISTED else []
    listed = ", ".join([*able[:_LISTED], *more]) or "none is served"
    if field:
        expected = f"unset, or a model with sources ({listed})"
        raise InvalidArgumentError(field, expected, f"it for {served.model}")
    raise UnsupportedError(
        f"{served.model} has no sources to name, as it is neither an analytic model with a bank "
        f"nor one of pictures; models that have: {listed}"
    )


def read_explain(
    request: pb.ExplainRequest, info: DenoiserInfo, limits: Limits
) -> tuple[Query, Detail]:
    """Return the query of a request, and what its explanations have.

    Raises:
        InvalidArgumentError, ResourceExhaustedError: A field is wrong, or asks for too much.
    """
    detail = _detail("top", request.top, "return_images", request.return_images)
    x = request.x
    shape = tensors.decode_shape(x, len(x.data), "x", limits)
    tensors.check_answer_size("top", explanation_size(shape[1:], detail, info), limits)
    query = make_query(
        forms.black(shape),
        tensors.decode_level(request.level, info.levels, limits),
        tensors.bounded("labels", request.labels, limits),
        tensors.decode_windows(tensors.bounded("windows", request.windows, limits)),
    )
    query.pixels = tensors.pixels_of(x.data, x.dtype, "x", shape)
    return query, detail


def read_explained_steps(
    request: pb.SampleRequest, limits: Limits
) -> tuple[frozenset[int], Detail]:
    """Return the steps that a request wants explained, possibly none, and how.

    Raises:
        InvalidArgumentError, ResourceExhaustedError: A field is wrong, or asks for too much.
    """
    if not request.explain_steps:
        for field in ("explain_top", "explain_images"):
            if number := getattr(request, field):
                raise InvalidArgumentError(field, "0 without explain_steps", number)
        return frozenset(), Detail(DEFAULT_SOURCES, 0)
    # A slice of a repeated field is a list; a message may have tens of millions of values.
    steps = request.explain_steps[: limits.max_steps + 1]
    if len(steps) > limits.max_steps:
        expected = f"at most {limits.max_steps} steps"
        raise ResourceExhaustedError("explain_steps", expected, len(request.explain_steps))
    if steps[0] < 1 or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        got = steps[: tensors.MAX_REPORTED]
        raise InvalidArgumentError("explain_steps", "rising numbers of steps, from 1", got)
    detail = _detail("explain_top", request.explain_top, "explain_images", request.explain_images)
    return frozenset(steps), detail


def explanation_size(shape: Sequence[int], detail: Detail, info: DenoiserInfo) -> int:
    """Return the most bytes of the explanation of one image [C, H, W]."""
    channels, height, width = shape
    bank, images = info.bank, min(_source_images(info), MAX_SHARES)
    names = sum(len(name.encode()) + _FIELD_BYTES for name in info.label_names)
    if bank is not None and bank.longest_name is not None:
        names += min(images, MAX_NAMES) * (bank.longest_name + _FIELD_BYTES)
    # Denoised image and variance, entropy, weights and sources; bank images; share, label and size.
    pixels = height * width * (2 * channels + 1 + 4 * detail.top)
    bank_pixels = info.shape[1] * info.shape[2]
    if bank is not None:
        bank_pixels = max(bank_pixels, bank.most_pixels)
    sizes = images if info.scales or (bank is not None and bank.sizes is not None) else 1
    shares = 12 * images + 8 * sizes
    return 4 * (pixels + channels * detail.images * bank_pixels) + shares + names


def _source_images(info: DenoiserInfo) -> int:
    """Return the number of images that have shares: those of every scale of a picture."""
    return 0 if info.bank is None else info.bank.images * max(1, len(info.scales))


def held_explanation(info: DenoiserInfo, shape: Sequence[int]) -> int:
    """Return the bytes that a computed explanation of an image [C, H, W] and its message hold."""
    channels, height, width = shape
    images = _source_images(info)
    # Arrays of a message, sources of seven words (three of them int64), float64 shares.
    arrays = 4 * height * width * (2 * channels + 1 + 7 * MAX_SOURCES) + 8 * images
    return arrays + explanation_size(shape, Detail(MAX_SOURCES, MAX_IMAGES), info)


def write_explanation(
    index: int, found: Explanation, detail: Detail, info: DenoiserInfo
) -> pb.ExplainResponse:
    """Return the message of one image.

    Args:
        index: of the image in the request.
        found: its explanation, with at least ``detail.top`` sources.
        detail: what the message has.
        info: description of the model.
    """
    bank, shares = found.bank, found.shares[0]
    order = np.argsort(-shares, kind="stable")[:MAX_SHARES]
    order = order[shares[order] > 0]
    names = () if bank.file_names is None else order[:MAX_NAMES]
    extents = bank.extents[order]
    if (bank.extents == bank.extents[0]).all():
        extents = extents[:1]
    message = pb.ExplainResponse(
        index=index,
        denoised=tensors.encode_tensor(found.pixels),
        variance=tensors.encode_tensor(found.variance),
        entropy=tensors.encode_tensor(found.entropy),
        weights=tensors.encode_tensor(found.weights[..., : detail.top]),
        sources=_int32(found.sources[0, :, :, : detail.top]),
        share_images=_int32(order),
        shares=tensors.encode_tensor(shares[order].astype(np.float32)),
        share_labels=_int32(bank.labels[order]) if bank.label_count else b"",
        share_sizes=_int32(extents),
        dropped_share=max(0.0, 1.0 - float(shares[order].sum())),
        bank_fingerprint=bank.fingerprint,
        bank_images=len(shares),
        label_names=info.label_names if index == 0 else (),
        file_names=[bank.file_names[i] for i in names] if bank.file_names else (),
    )
    shown = [bank.image(image) for image in order[: detail.images].tolist()]
    if info.bank is not None and info.bank.sizes is not None:
        for pixels in shown:
            tensors.write_tensor(message.sized_images.add(), pixels[None])
    elif shown:
        tensors.write_tensor(message.images, np.stack(shown))
    return message


def _detail(top_field: str, top: int, images_field: str, images: int) -> Detail:
    if not 0 <= top <= MAX_SOURCES:
        raise InvalidArgumentError(top_field, f"1 to {MAX_SOURCES}, or 0", top)
    if not 0 <= images <= MAX_IMAGES:
        raise InvalidArgumentError(images_field, f"0 to {MAX_IMAGES}", images)
    return Detail(top or DEFAULT_SOURCES, images)


def _int32(values: npt.NDArray[np.int64]) -> bytes:
    return values.astype("<i4").tobytes()
