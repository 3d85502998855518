"""Requests for reports of originality, of ``Originality`` and ``Sample``, and their messages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo, Query, make_query
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.originality import DEFAULT_SIGMA, DEFAULT_WINDOW, NEIGHBOURS, Originality
from els_service.denoisers.query_checks import largest_window
from els_service.engine.model_versions import ModelVersion
from els_service.engine.registry import ModelRegistry
from els_service.errors import InvalidArgumentError, UnsupportedError
from els_service.server.requests import forms, tensors

DEFAULT_NEAREST = 8
_LISTED = 20
"""Models that an error lists."""
_MEASURE_BYTES = 2048
"""Most bytes of the measures of a report and their reasons."""
_NEAREST_BYTES = 16
"""Of a nearest image beside the name of its file: number, distance, label, and their tags."""
_OPTIONAL = (
    *("gap_ratio", "carlini_ratio", "largest_share", "sources_of_90", "seams", "clear"),
    *("largest_region", "in_place"),
)


@dataclass(frozen=True)
class Wanted:
    """Reports that a ``Sample`` request asks for.

    Attributes:
        served: model whose bank is used.
        labels: of the images, [count], -1 for none: they restrict the sources.
    """

    served: ModelVersion
    labels: npt.NDArray[np.int64]


def check_bank(served: ModelVersion, models: ModelRegistry, field: str = "") -> None:
    """Check that a model has a bank.

    Args:
        served: the model.
        models: registry; an error lists those of its models that have a bank.
        field: of a request that is valid without it; empty for ``Originality``, which is not.

    Raises:
        InvalidArgumentError: It has none, and the field asks for what needs one.
        UnsupportedError: It has none, and there is no field.
    """
    if served.info.has_originality:
        return
    able = [each.model for each in models.newest() if each.info.has_originality]
    more = ["…"] if len(able) > _LISTED else []
    listed = ", ".join([*able[:_LISTED], *more]) or "none is served"
    if field:
        raise InvalidArgumentError(field, f"a model with a bank ({listed})", served.model)
    raise UnsupportedError(f"{served.model} has no bank images; models that have: {listed}")


def read_originality(
    request: pb.OriginalityRequest, info: DenoiserInfo, limits: Limits
) -> tuple[Query, int]:
    """Return the query of a request, and the number of nearest images that its reports list.

    Raises:
        InvalidArgumentError, ResourceExhaustedError: A field is wrong, or asks for too much.
    """
    if not 0 <= request.nearest <= NEIGHBOURS:
        raise InvalidArgumentError("nearest", f"1 to {NEIGHBOURS}, or 0", request.nearest)
    nearest = request.nearest or DEFAULT_NEAREST
    x = request.x
    shape = tensors.decode_shape(x, len(x.data), "x", limits)
    tensors.check_answer_size("nearest", report_size(nearest, info), limits)
    level = from_sigma([DEFAULT_SIGMA])
    if request.HasField("level"):
        level = tensors.decode_level(request.level, info.levels, limits)
    query = make_query(
        forms.black(shape),
        level,
        tensors.bounded("labels", request.labels, limits),
        tensors.decode_windows(tensors.bounded("windows", request.windows, limits))
        or own_windows(info, shape),
    )
    query.pixels = tensors.pixels_of(x.data, x.dtype, "x", shape)
    return query, nearest


def check_reported(
    request: pb.SampleRequest, info: DenoiserInfo, shape: tuple[int, ...], bank: DenoiserInfo
) -> None:
    """Check that samples can be compared with the images of a bank.

    Args:
        request: wants reports.
        info: description of the model that samples.
        shape: [C, H, W] of the samples.
        bank: description of the model with the bank.

    Raises:
        InvalidArgumentError: They cannot.
    """
    if info.decoded_shape is not None:
        expected = "false for a model whose samples are latents"
        raise InvalidArgumentError("return_originality", expected, "true")
    sizes = bank.sizes
    if shape == bank.shape:
        return
    if sizes is not None and shape[0] == bank.shape[0] and (shape[1], shape[2]) in sizes:
        return
    field = "originality_model" if request.originality_model else "return_originality"
    expected = f"a bank of images {list(shape)}, the shape of the samples"
    raise InvalidArgumentError(field, expected, f"images {list(bank.shape)}")


def report_query(
    pixels: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], info: DenoiserInfo
) -> Query:
    """Return the query for reports of images [B, C, H, W] at the default level and window."""
    windows = own_windows(info, pixels.shape)
    return make_query(pixels, from_sigma([DEFAULT_SIGMA]), labels.tolist(), windows)


def own_windows(info: DenoiserInfo, shape: tuple[int, ...]) -> list[int]:
    """Return the window that sources of images [B, C, H, W] are found with; empty without one."""
    if not info.has_sources or not info.max_window:
        return []
    return [max(1, min(DEFAULT_WINDOW, largest_window(info, shape[2], shape[3])))]


def report_size(nearest: int, info: DenoiserInfo) -> int:
    """Return the most bytes of the report of one image."""
    longest = None if info.bank is None else info.bank.longest_name
    return _MEASURE_BYTES + nearest * (_NEAREST_BYTES + (longest or 0))


def held_report(info: DenoiserInfo, shape: tuple[int, ...]) -> int:
    """Return the bytes that the computed report of one image [C, H, W] holds."""
    images = 0 if info.bank is None else info.bank.images * max(1, len(info.scales))
    channels, height, width = shape
    # Distances and shares of the bank's images; image, D(x), and sources of a few numbers a pixel.
    return 24 * images + 4 * height * width * (2 * channels + 200) + report_size(NEIGHBOURS, info)


def write_originality(index: int, found: Originality, nearest: int) -> pb.OriginalityResponse:
    """Return the message of one image.

    Args:
        index: of the image in the request.
        found: its report.
        nearest: number of nearest images that the message has.
    """
    report, bank = found.reports[0], found.bank
    images = report.nearest[:nearest]
    message = pb.OriginalityResponse(
        index=index,
        nearest_images=images.astype("<i4").tobytes(),
        distances=tensors.encode_tensor(report.distances[:nearest]),
        absent=report.absent,
        bank_fingerprint=bank.fingerprint,
        bank_images=len(bank),
        nearest_labels=bank.labels[images].astype("<i4").tobytes() if bank.label_count else b"",
        file_names=[bank.file_names[i] for i in images] if bank.file_names else (),
    )
    for name in _OPTIONAL:
        if (value := getattr(report, name)) is not None:
            setattr(message, name, value)
    if report.largest_share is not None:
        message.largest_image = report.largest_image
    return message
