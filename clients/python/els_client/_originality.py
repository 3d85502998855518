"""How original images are: the result of ``originality``, and its conversion from messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from els_client import _codec as codec
from els_client.errors import error_of
from els_proto.denoise.v1 import denoise_pb2 as pb

if TYPE_CHECKING:
    from els_client._types import Images, Query

MEMORISED = 1 / 3
"""Gap ratio below which an image counts as memorised (Gu et al., TMLR 2025)."""
EIDETIC = 1.0
"""Carlini ratio below which an image counts as an eidetic copy (Carlini et al., USENIX 2023)."""
COPIED = 0.5
"""Largest region from which an image counts as a copy of a part of the bank."""
_MEASURES = frozenset(
    {
        *("gap_ratio", "carlini_ratio", "largest_share", "largest_image", "sources_of_90"),
        *("seams", "clear", "largest_region", "in_place"),
    }
)


@dataclass(frozen=True, eq=False)
class Originality:
    """Measures of memorisation of one image against a bank; None where ``absent`` has a reason.

    A source of a pixel counts if its weight is at least half of the pixel's largest. Pixels agree
    if a counted source of one has the bank image and the displacement of one of the other's.

    Attributes:
        nearest: Bank images of least distance, rising, int64 [n].
        distances: Euclidean distance of each over all pixels, float32 [n].
        labels: Label of each, int64 [n]; -1 for an unlabelled bank.
        file_names: Name of the file of each; empty if the bank does not know them.
        bank_fingerprint: SHA-256 of the bank, hexadecimal, as in ``Model.bank``.
        bank_images: Number of images of the bank.
        gap_ratio: Distance of the nearest bank image over that of the second nearest.
        carlini_ratio: d / (0.5·mean of the 50 smallest d) of the nearest image, d the largest
            distance of two tiles of a 4 × 4 grid.
        largest_share: Largest share of a bank image in the sources of all pixels.
        largest_image: That bank image.
        sources_of_90: Least number of bank images that make 90 % of the sources.
        seams: Share of the pairs of neighbouring clear pixels that do not agree.
        clear: Share of clear pixels, whose counted sources weigh at least 0.5 together.
        largest_region: Share of the pixels in the largest connected region of one bank image and
            displacement.
        in_place: Share of the pixels with a counted source at their own place.
        absent: Measure → reason why it is None.
    """

    nearest: npt.NDArray[np.int64]
    distances: Images
    labels: npt.NDArray[np.int64]
    file_names: tuple[str, ...]
    bank_fingerprint: str
    bank_images: int
    gap_ratio: float | None = None
    carlini_ratio: float | None = None
    largest_share: float | None = None
    largest_image: int | None = None
    sources_of_90: int | None = None
    seams: float | None = None
    clear: float | None = None
    largest_region: float | None = None
    in_place: float | None = None
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def memorised(self) -> bool | None:
        """Whether the gap ratio is below 1/3; None without one."""
        return None if self.gap_ratio is None else self.gap_ratio < MEMORISED

    @property
    def eidetic(self) -> bool | None:
        """Whether the Carlini ratio is below 1; None without one."""
        return None if self.carlini_ratio is None else self.carlini_ratio < EIDETIC

    @property
    def copied(self) -> bool | None:
        """Whether one region of at least half of the pixels was copied; None without sources."""
        return None if self.largest_region is None else self.largest_region >= COPIED


def encode_originality(query: Query, nearest: int) -> pb.OriginalityRequest:
    """Return the request for reports of a query's images, with ``nearest`` bank images each."""
    # In the message 0 means 8.
    codec.check_count("nearest", nearest, least=1)
    codec.check_plain(query)
    given = [one for one in (query.sigma, query.alpha_bar, query.time) if one is not None]
    base = codec.encode_query(
        pb.DenoiseRequest, query, level=codec.encode_level(1.0, None, None) if not given else None
    )
    return pb.OriginalityRequest(
        model=base.model,
        x=base.x,
        level=base.level if given else None,
        labels=base.labels,
        windows=base.windows,
        nearest=int(nearest),
        priority=base.priority,
        version=base.version,
    )


def decode_originality(
    messages: Sequence[pb.OriginalityResponse], count: int
) -> tuple[Originality, ...]:
    """Return the reports of all ``count`` images of a request, one message each."""
    if [message.index for message in messages] != list(range(count)):
        got = [message.index for message in messages]
        raise error_of("INTERNAL", f"the server reported images {got} of {count}")
    return tuple(map(_decode, messages))


def _decode(message: pb.OriginalityResponse) -> Originality:
    nearest = np.frombuffer(message.nearest_images, "<i4").astype(np.int64)
    labels = np.full(len(nearest), -1)
    if message.nearest_labels:
        labels = np.frombuffer(message.nearest_labels, "<i4").astype(np.int64)
    # An optional field is listed if it was set, even to 0.
    given = {one.name: value for one, value in message.ListFields() if one.name in _MEASURES}
    return Originality(
        nearest=nearest,
        distances=codec.decode_tensor(message.distances),
        labels=labels,
        file_names=tuple(message.file_names),
        bank_fingerprint=message.bank_fingerprint,
        bank_images=message.bank_images,
        absent=dict(message.absent),
        **given,
    )
