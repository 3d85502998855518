"""Decoding of ``Denoise``, ``DenoiseStream`` and ``Score`` requests; encoding of responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.descriptor import Descriptor
from torch import Tensor

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import Denoised, Query, make_query
from els_service.engine.model_versions import ModelVersion
from els_service.engine.registry import ModelRegistry
from els_service.errors import InvalidArgumentError
from els_service.server.requests import forms, tensors
from els_service.server.requests.conditioning import decode_conditions, decode_guidance
from els_service.server.requests.forms import Form, FormCache


@dataclass(eq=False, slots=True)
class DenoiseForm(Form):
    """Form of requests of one method."""

    size: int
    """Bytes of the pixels."""
    dtype: int
    """Dtype of the pixels."""
    output_dtype: pb.DType.ValueType
    log_evidence: bool
    """Whether the log evidence is returned."""
    prefix: bytes
    """Bytes of the response up to its pixels, which are its end; empty if it has log evidence."""


class DenoiseMethod:
    """Decoder of the requests of one method, and encoder of its responses.

    Args:
        models: served models.
        limits: of requests.
        response: message class of the responses.
        path: names of the nested fields of the response's tensor.
    """

    def __init__(
        self, models: ModelRegistry, limits: Limits, response: type[Any], *path: str
    ) -> None:
        self._models, self._limits = models, limits
        self._response, self._path = response, path
        self._numbers = _numbers(response.DESCRIPTOR, path)
        self._forms: FormCache[DenoiseForm] = FormCache()

    def read(self, request: tensors.Request) -> tuple[ModelVersion, DenoiseForm, Query, bool]:
        """Return model, form and query of a request, and whether the model has checked the query.

        Raises:
            NotFoundError, UnavailableError: No such model.
            InvalidArgumentError, ResourceExhaustedError: A field is wrong, or exceeds a limit.
        """
        model, version = request.model, request.version
        served = self._models.find(model, version)
        x = request.x
        data, shape = x.data, tuple(x.shape[: tensors.MAX_REPORTED])
        key = model, version, x.dtype, shape, request.output_dtype, request.return_log_evidence
        form = self._forms.get(key, served.info)
        if form is None:
            form = self._form(request, len(data), served)
            if form.checked:  # otherwise it is validated again once the model is loaded
                self._forms.put(key, form)
        elif len(data) != form.size:
            tensors.check_bytes(len(data), form.dtype, "x", shape)
        level = tensors.decode_level(request.level, served.info.levels, self._limits)
        if form.checked and len(level) in (1, shape[0]) and not _has_more(request):
            # The same as below, in a third of the time.
            pixels = tensors.pixels_of(data, form.dtype, "x", shape)
            query = Query(pixels, level.repeat(shape[0]), form.labels, form.windows, ())
            return served, form, query, True
        query = make_query(
            forms.black(shape),
            level,
            tensors.bounded("labels", request.labels, self._limits),
            tensors.decode_windows(tensors.bounded("windows", request.windows, self._limits)),
            decode_conditions(request, served.info, shape[0]),
        )
        query.guidance = decode_guidance(request, shape[0])
        checked = forms.check(served, query)
        query.pixels = tensors.pixels_of(data, form.dtype, "x", shape)
        return served, form, query, checked

    def write(
        self,
        form: DenoiseForm,
        pixels: Tensor | npt.NDArray[np.float32],
        denoised: Denoised,
        variance: npt.NDArray[np.float32] | None = None,
        shares: Sequence[float] = (),
    ) -> bytes:
        """Return the serialised response.

        Args:
            form: of the request.
            pixels: of the response, [B, C, H, W].
            denoised: with the log evidence, which is encoded if the form has it.
            variance: of the pixels; None if it is not returned.
            shares: of the bank, one for each image; empty if they are not returned.
        """
        if form.log_evidence or variance is not None or shares:
            message, parent = self._message(form.shape, form.output_dtype)
            getattr(parent, self._path[-1]).data = tensors.bytes_of(pixels, form.output_dtype)
            if form.log_evidence:
                tensors.write_evidence(parent.log_evidence, denoised)
            if variance is not None:
                tensors.write_tensor(parent.variance, variance)
            if shares:
                parent.bank_shares.extend(shares)
            data: bytes = message.SerializeToString()
            return data
        parts: list[Any] = [form.prefix, tensors.buffer_of(pixels, form.output_dtype)]
        return b"".join(parts)

    def _form(self, request: tensors.Request, size: int, served: ModelVersion) -> DenoiseForm:
        info, limits, dtype = served.info, self._limits, request.output_dtype
        shape = tensors.decode_shape(request.x, size, "x", limits)
        evidence = request.return_log_evidence
        if evidence and not info.has_log_evidence:
            raise InvalidArgumentError("return_log_evidence", "false for this model", "true")
        response_size = tensors.answer_size(shape, dtype, evidence)
        tensors.check_answer_size("x.shape", response_size, limits)
        checked, labels, windows = forms.defaults(shape, served)
        prefix = b"" if evidence else self._prefix(shape, dtype)
        return DenoiseForm(
            *(info, checked, shape, labels, windows),
            *(size, request.x.dtype, dtype, evidence, prefix),
        )

    def _prefix(self, shape: tuple[int, ...], dtype: pb.DType.ValueType) -> bytes:
        """Return the bytes of a response up to its pixels, the last field on each level."""
        size = math.prod(shape) * tensors.output_size(dtype)
        tensor = pb.Tensor(dtype=dtype or pb.DTYPE_F32, shape=shape)
        prefix = tensor.SerializeToString() + forms.field_head(pb.Tensor.DATA_FIELD_NUMBER, size)
        for number in reversed(self._numbers):
            prefix = forms.field_head(number, len(prefix) + size) + prefix
        return prefix

    def _message(self, shape: tuple[int, ...], dtype: pb.DType.ValueType) -> tuple[Any, Any]:
        """Return a response without pixels, and the nested message that contains its tensor."""
        message = parent = self._response()
        for name in self._path[:-1]:
            parent = getattr(parent, name)
        tensor: pb.Tensor = getattr(parent, self._path[-1])
        tensor.dtype = dtype or pb.DTYPE_F32
        tensor.shape[:] = shape
        return message, parent


def _numbers(descriptor: Descriptor, path: Sequence[str]) -> list[int]:
    """Return the numbers of nested fields."""
    numbers = []
    parent: Descriptor | None = descriptor
    for name in path:
        assert parent is not None
        field = parent.fields_by_name[name]
        numbers.append(field.number)
        parent = field.message_type
    return numbers


def _has_more(request: tensors.Request) -> bool:
    """Return whether a request has labels, windows or conditioning."""
    return bool(
        request.labels
        or request.windows
        or request.guidance
        or request.HasField("conditioning")
        or request.HasField("unconditional")
    )
