"""What any answer must be, whatever was asked: prompt, documented, short, of the promised shape."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import grpc
import numpy as np
import torch
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as oip

BOUND_S = 20.0
"""Far more than any request of these tests takes on two busy cores."""
MOST_BYTES = 16 << 20
"""Of a message: the servers' limit."""
HEADERS = 8192
"""Bytes of metadata that every client accepts."""
# In a load's way, or while a model is loaded that was not served: the contract's words for both.
CODES = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
_TEXT = re.compile(r"[\w.\[\]]+: expected .+, got .*", re.DOTALL)
_ITEM = {pb.DTYPE_F32: 4, pb.DTYPE_F16: 2, pb.DTYPE_BF16: 2}


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    code: str
    text: str
    status: status_pb2.Status | None
    headers: int
    answers: list[Any]
    seconds: float


def full_name(method: MethodDescriptor) -> str:
    """Return the path of a method."""
    return f"/{method.containing_service.full_name}/{method.name}"


def begin(channel: grpc.Channel, method: MethodDescriptor, data: bytes) -> Any:
    """Start a call of a unary request and return it."""
    parse = GetMessageClass(method.output_type).FromString
    if method.server_streaming:
        streamed: Any = channel.unary_stream(full_name(method), response_deserializer=parse)
        return streamed(data, timeout=BOUND_S)
    unary: Any = channel.unary_unary(full_name(method), response_deserializer=parse)
    return unary.future(data, timeout=BOUND_S)


def finish(call: Any, method: MethodDescriptor, since: float) -> Outcome:
    """Wait for a call's end."""
    answers: list[Any] = []
    try:
        if method.server_streaming:
            answers.extend(call)
        else:
            answers.append(call.result())
    except (grpc.RpcError, grpc.FutureCancelledError):
        pass
    seconds = time.monotonic() - since
    pairs = [*(call.initial_metadata() or ()), *(call.trailing_metadata() or ())]
    text = call.details() or ""
    headers = len(quote(text)) + sum(len(key) + len(value) * 4 // 3 + 32 for key, value in pairs)
    code = call.code().name
    status = None if code in ("OK", "CANCELLED") else rpc_status.from_call(call)
    return Outcome(code, text, status, headers, answers, seconds)


UNSUPPORTED = {"RepositoryModelLoad", "Explain", "Originality", "Vjp", "Jvp"}
"""Methods that may fail for what a model is, not for what a request says."""


def ask(channel: grpc.Channel, method: MethodDescriptor, data: bytes) -> Outcome:
    """Make one call of a unary request and wait for its end."""
    since = time.monotonic()
    return finish(begin(channel, method, data), method, since)


def judge(method: MethodDescriptor, data: bytes, outcome: Outcome) -> None:
    """Check what must hold of every call."""
    allowed = CODES | ({"FAILED_PRECONDITION"} if method.name in UNSUPPORTED else set())
    assert outcome.code in allowed, (outcome.code, outcome.text)
    assert outcome.seconds < BOUND_S / 2
    assert outcome.headers < HEADERS, outcome.headers
    if len(data) > MOST_BYTES:
        # gRPC refuses it before it is ours, in its own words and without details.
        assert outcome.code == "RESOURCE_EXHAUSTED"
        assert f"({len(data)} vs. {MOST_BYTES})" in outcome.text
    elif outcome.code == "OK":
        request = GetMessageClass(method.input_type).FromString(data)
        judge_answers(request, outcome.answers)
    else:
        assert outcome.status is not None, (outcome.code, outcome.text)
        judge_refusal(outcome.status, outcome.text)


def judge_refusal(status: status_pb2.Status, text: str) -> None:
    """Check that a refusal says what was expected and got, in words and in details."""
    code = code_pb2.Code.Name(status.code)
    assert status.message == text
    request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    blamed = [detail for detail in status.details if detail.Unpack(request)]
    if code == "INVALID_ARGUMENT" or (code == "RESOURCE_EXHAUSTED" and blamed):
        (violation,) = request.field_violations
        assert _TEXT.fullmatch(text), text
        assert text == f"{violation.field}: {violation.description}"
    elif code == "RESOURCE_EXHAUSTED":
        assert any(detail.Unpack(retry) for detail in status.details), text
    else:
        assert text


def judge_answers(request: Message, answers: list[Any]) -> None:
    """Check that answers have what was promised for their request."""
    match request:
        case pb.DenoiseRequest():
            _check_query(request, answers[0], answers[0].denoised)
        case pb.ScoreRequest():
            _check_query(request, answers[0], answers[0].score)
        case pb.SampleRequest():
            _check_sample(request, answers)
        case pb.VjpRequest():
            _check_tensor(answers[0].denoised, request.x.shape, request.output_dtype)
            _check_tensor(answers[0].vjp, request.x.shape, request.output_dtype)
        case pb.JvpRequest():
            _check_tensor(answers[0].denoised, request.x.shape, request.output_dtype)
            _check_tensor(answers[0].jvp, request.x.shape, request.output_dtype)
        case pb.ExplainRequest():
            assert [answer.index for answer in answers] == list(range(request.x.shape[0]))
            for answer in answers:
                _check_explanation(answer, request.x.shape, request.top, request.return_images)
        case pb.OriginalityRequest():
            assert [answer.index for answer in answers] == list(range(request.x.shape[0]))
            for answer in answers:
                count = len(answer.nearest_images) // 4
                assert 1 <= count <= (request.nearest or 8)
                _check_tensor(answer.distances, [count], pb.DTYPE_F32)
        case oip.ModelInferRequest():
            _check_inference(request, answers[0])
        case _:
            assert len(answers) == 1


def _check_query(request: Any, answer: Any, tensor: pb.Tensor) -> None:
    _check_tensor(tensor, request.x.shape, request.output_dtype)
    assert answer.HasField("log_evidence") == request.return_log_evidence
    if isinstance(request, pb.DenoiseRequest):
        assert answer.HasField("variance") == request.return_variance
        if request.return_variance:
            _check_tensor(answer.variance, request.x.shape, pb.DTYPE_F32)
    if request.return_log_evidence:
        batch, _, height, width = request.x.shape
        _check_tensor(answer.log_evidence, [batch, height, width], pb.DTYPE_F32)


def _check_explanation(answer: pb.ExplainResponse, shape: Any, top: int, images: int) -> None:
    channels, height, width = shape[1:]
    _check_tensor(answer.denoised, [1, channels, height, width], pb.DTYPE_F32)
    _check_tensor(answer.variance, [1, channels, height, width], pb.DTYPE_F32)
    _check_tensor(answer.entropy, [1, height, width], pb.DTYPE_F32)
    _check_tensor(answer.weights, [1, height, width, top or 8], pb.DTYPE_F32)
    assert len(answer.sources) == 12 * height * width * (top or 8)
    shares = np.frombuffer(answer.shares.data, "<f4")
    assert abs(shares.sum() + answer.dropped_share - 1) <= 1e-6
    assert answer.HasField("images") == bool(images)
    if images:
        _check_tensor(
            answer.images, [min(images, len(shares)), channels, height, width], pb.DTYPE_F32
        )


def _check_sample(request: pb.SampleRequest, answers: list[Any]) -> None:
    first, last = answers[0], answers[-1]
    resumed = bool(request.resume_token)
    assert [answer.index for answer in answers] == list(range(first.index, last.total + 1))
    assert resumed == (first.index > 1)
    assert last.alpha_bar == 1
    for answer in answers:
        final = answer is last
        asked = {
            "x": request.return_x or final,
            "denoised": request.return_denoised or final,
            "noise": request.return_noise and answer.index == 1,
        }
        for name, wanted in asked.items():
            assert answer.HasField(name) == wanted, name
            if wanted:
                tensor = getattr(answer, name)
                assert tensor.shape[0] == max(1, request.count)
                # The scales of a picture have sizes of their own.
                shape = last.x.shape if answer.scale + 1 >= answer.scales else tensor.shape
                assert tensor.shape[1] == last.x.shape[1]
                _check_tensor(tensor, shape, request.output_dtype)
        assert bool(answer.resume_token) == (request.return_resume_token and not final)
        explained = answer.index in request.explain_steps
        assert len(answer.explanations) == explained * max(1, request.count)
        for found in answer.explanations:
            shape = [1, *last.x.shape[1:]]
            _check_explanation(found, shape, request.explain_top, request.explain_images)


def _check_inference(request: oip.ModelInferRequest, answer: oip.ModelInferResponse) -> None:
    assert (answer.model_name, answer.id) == (request.model_name, request.id)
    if request.outputs:
        assert [o.name for o in answer.outputs] == [o.name for o in request.outputs]
    x = next(tensor for tensor in request.inputs if tensor.name == "x")
    batch, _, height, width = x.shape
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        evidence = output.name == "log_evidence"
        assert list(output.shape) == ([batch, height, width] if evidence else list(x.shape))
        numbers = np.frombuffer(raw, "<f4").reshape(tuple(output.shape))
        assert np.isfinite(numbers).all()


def _check_tensor(tensor: pb.Tensor, shape: Any, dtype: int) -> None:
    asked = dtype or pb.DTYPE_F32
    assert (tensor.dtype, list(tensor.shape)) == (asked, list(shape))
    assert len(tensor.data) == _ITEM[tensor.dtype] * int(np.prod(shape))
    if asked == pb.DTYPE_F32:
        assert np.isfinite(np.frombuffer(tensor.data, "<f4")).all()
    elif asked == pb.DTYPE_BF16:
        numbers = torch.frombuffer(bytearray(tensor.data), dtype=torch.bfloat16)
        assert bool(torch.isfinite(numbers).all())
    else:
        # By contract what is beyond float16 turns into infinity, but never into NaN.
        assert not np.isnan(np.frombuffer(tensor.data, "<f2")).any()


def parses(method: MethodDescriptor, data: bytes) -> bool:
    """Return whether bytes are a message of a method."""
    try:
        GetMessageClass(method.input_type).FromString(data)
    except DecodeError:
        return False
    return True
