"""Jacobian products and explanations: results, and conversion between numpy and messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from els_client import _codec as codec
from els_client._types import Images, Pixels, Query
from els_client.errors import InvalidArgumentError, Violation, error_of
from els_proto.denoise.v1 import denoise_pb2 as pb

_Product = TypeVar("_Product", pb.VjpRequest, pb.JvpRequest)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where each pixel of denoised images came from.

    Attributes:
        denoised: E[x0 | x], float32 [B, C, H, W].
        variance: Posterior variance of each pixel, float32 [B, C, H, W].
        entropy: Posterior entropy in nats, float32 [B, H, W].
        sources: The m sources of largest weight of each pixel, int64 [B, H, W, m, 3]: bank image,
            row, column; -1 where a pixel has fewer.
        weights: Their weights, float32 [B, H, W, m], falling; 0 where a pixel has fewer.
        shares: Share of each bank image in each result, float64 [B, N]; with ``dropped_share`` they
            sum to 1.
        dropped_share: Share of the images whose shares are not given, float64 [B]; 0 for banks of
            at most 65,536 images.
        labels: Label of each bank image with a share, int64 [N], else -1; all -1 for unlabelled
            banks.
        label_names: Empty, or one name for each label.
        bank_fingerprint: SHA-256 of the bank, hexadecimal, as in ``Model.bank``.
    """

    denoised: Images
    variance: Images
    entropy: Images
    sources: npt.NDArray[np.int64]
    weights: Images
    shares: npt.NDArray[np.float64]
    dropped_share: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]
    bank_fingerprint: str

    @property
    def effective_sources(self) -> Images:
        """Effective number of sources of each pixel, exp of the entropy, float32 [B, H, W]."""
        return np.exp(self.entropy)


def encode_product(request: type[_Product], query: Query, field: str, given: Pixels) -> _Product:
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
    )
    getattr(message, field).CopyFrom(codec.encode_direction(field, given))
    return message


def encode_explain(query: Query, top: int) -> pb.ExplainRequest:
    """Return the request to explain a query."""
    if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 1:
        # In the message 0 means 8.
        _refuse("top", "an integer of at least 1", top)
    for field in ("conditioning", "unconditional", "guidance"):
        if getattr(query, field) is not None:
            _refuse(field, "none, as no model that explains takes it", "one")
    base = codec.encode_query(pb.DenoiseRequest, query)
    if top > np.iinfo(np.int32).max:
        _refuse("top", "1 to 16", top)
    return pb.ExplainRequest(
        model=base.model,
        x=base.x,
        level=base.level,
        labels=base.labels,
        windows=base.windows,
        top=int(top),
        priority=base.priority,
        version=base.version,
    )


def decode_explanation(
    request: pb.ExplainRequest, messages: Sequence[pb.ExplainResponse]
) -> Explanation:
    """Return the explanation of all images of a request."""
    count = request.x.shape[0]
    if [message.index for message in messages] != list(range(count)):
        got = [message.index for message in messages]
        raise error_of("INTERNAL", f"the server explained images {got} of {count}")
    weights = _together(messages, "weights")
    shape = (*weights.shape[1:], 3)
    sources = [_integers(message.sources).reshape(shape) for message in messages]
    shares = np.zeros((len(messages), messages[0].bank_images))
    labels = np.full(messages[0].bank_images, -1)
    for row, message in zip(shares, messages, strict=True):
        images = _integers(message.share_images)
        row[images] = codec.decode_tensor(message.shares)
        if message.share_labels:
            labels[images] = _integers(message.share_labels)
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
    )


def _together(messages: Sequence[pb.ExplainResponse], field: str) -> Images:
    return np.concatenate([codec.decode_tensor(getattr(message, field)) for message in messages])


def _integers(data: bytes) -> npt.NDArray[np.int64]:
    return np.frombuffer(data, "<i4").astype(np.int64)


def _refuse(field: str, expected: str, got: object) -> None:
    description = f"expected {expected}, got {got}"
    raise InvalidArgumentError(f"{field}: {description}", [Violation(field, description)])
