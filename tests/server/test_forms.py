"""A form serves every request with its shapes and dtypes, and the rest is read at every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.support.bad_inferences import fp32, infer, int64
from tests.support.bad_requests import denoise, tensor
from tests.support.models_folder import LABELS, SHAPE
from tests.support.opened import OneModel

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as oip
from els_service.config import Limits
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.levels import from_alpha_bar, from_sigma, from_time
from els_service.errors import InvalidArgumentError
from els_service.server.requests import forms, tensors
from els_service.server.requests.denoise import DenoiseForm, DenoiseMethod
from els_service.server.requests.inference import InferenceForm, InferenceMethod

INFO = DenoiserInfo(
    kind="analytic", shape=SHAPE, label_count=LABELS, max_window=5, has_log_evidence=True
)
LIMITS = Limits(max_images=8, max_steps=10, max_message_bytes=1 << 16, max_pixels=1 << 20)
PATHS: dict[Any, tuple[str, ...]] = {
    pb.DenoiseResponse: ("denoised",),
    pb.ScoreResponse: ("score",),
    pb.DenoiseStreamResponse: ("response", "denoised"),
}
DTYPES = [pb.DTYPE_UNSPECIFIED, pb.DTYPE_F32, pb.DTYPE_F16, pb.DTYPE_BF16]


@pytest.fixture
def models() -> OneModel:
    return OneModel(INFO)


@pytest.fixture
def method(models: Any) -> DenoiseMethod:
    return DenoiseMethod(models, LIMITS, pb.DenoiseResponse, "denoised")


@pytest.fixture
def inference(models: Any) -> InferenceMethod:
    return InferenceMethod(models, LIMITS)


def form_of(method: DenoiseMethod, request: pb.DenoiseRequest) -> DenoiseForm:
    _, form, _, _ = method.read(request)
    return form


def asked(sigma: float = 1.0, images: int = 1, **options: Any) -> oip.ModelInferRequest:
    """Return a ``ModelInfer`` request with raw contents."""
    x = "x", "FP32", (images, *SHAPE), bytes(120 * images)
    return infer(x, fp32("sigma", sigma), **options)


@pytest.mark.parametrize(
    "changes",
    [
        {"level": pb.NoiseLevel(sigma=[2.0])},
        {"level": pb.NoiseLevel(alpha_bar=[0.5])},
        {"level": pb.NoiseLevel(time=[0.5])},
        {"labels": [1]},
        {"windows": [3]},
        {"priority": 1},
        {"timeout_s": 2.0},
        {"x": tensor(data=np.full(30, 0.5, "<f4").tobytes())},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_requests_that_differ_in_fields_decoded_at_each_call_share_a_form(
    method: DenoiseMethod, changes: dict[str, Any]
) -> None:
    assert form_of(method, denoise()) is form_of(method, denoise(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"version": "1"},
        {"x": tensor(shape=(2, *SHAPE), data=bytes(240))},
        {"x": tensor(dtype=pb.DTYPE_F16, data=bytes(60))},
        {"output_dtype": pb.DTYPE_F16},
        {"return_log_evidence": True},
    ],
    ids=str,
)
def test_requests_that_differ_in_anything_else_have_forms_of_their_own(
    method: DenoiseMethod, changes: dict[str, Any]
) -> None:
    first = form_of(method, denoise())
    assert form_of(method, denoise(**changes)) is not first
    assert form_of(method, denoise()) is first


def test_every_call_has_its_own_level_and_pixels(method: DenoiseMethod) -> None:
    for value in (0.25, 0.5, 2.0):
        data = np.full(30, value, "<f4").tobytes()
        level = pb.NoiseLevel(sigma=[value])
        *_, query, checked = method.read(denoise(x=tensor(data=data), level=level))
        assert checked
        assert (query.pixels == value).all()
        assert query.level.pairs == [(1.0, value)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"x": tensor(data=np.full(30, np.nan, "<f4").tobytes())}, "finite pixels"),
        ({"x": tensor(data=bytes(119))}, "expected 120 bytes"),
        ({"level": pb.NoiseLevel()}, "exactly one of"),
        ({"level": pb.NoiseLevel(sigma=[-1.0])}, "level.sigma"),
        ({"level": pb.NoiseLevel(sigma=[1.0, 2.0])}, "1 value or 1"),
        ({"labels": [LABELS]}, "labels"),
        ({"windows": [0]}, "windows"),
        ({"windows": [4]}, "windows"),
        ({"guidance": 2.0}, "guidance"),
    ],
    ids=str,
)
def test_a_known_form_hides_no_error(
    method: DenoiseMethod, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=expected) as new:
        method.read(denoise(**changes))
    method.read(denoise())
    with pytest.raises(InvalidArgumentError, match=expected) as known:
        method.read(denoise(**changes))
    assert str(known.value) == str(new.value)


def test_a_request_that_never_fits_is_not_kept_and_is_refused_before_its_pixels_are_read(
    method: DenoiseMethod,
) -> None:
    wrong = tensor(shape=(1, 1, 2, 3), data=np.full(6, np.nan, "<f4").tobytes())
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match=r"x: expected shape"):
            method.read(denoise(x=wrong))
    assert len(method._forms) == 0


@pytest.mark.parametrize("known", [False, True])
def test_a_model_that_is_loaded_again_validates_again(
    models: OneModel, method: DenoiseMethod, inference: InferenceMethod, known: bool
) -> None:
    if known:
        method.read(denoise(return_log_evidence=True))
        inference.read(asked(outputs=["log_evidence"]))
    models.info = replace(INFO, has_log_evidence=False)
    with pytest.raises(InvalidArgumentError, match="return_log_evidence"):
        method.read(denoise(return_log_evidence=True))
    with pytest.raises(InvalidArgumentError, match="outputs"):
        inference.read(asked(outputs=["log_evidence"]))


def test_a_request_to_a_model_that_is_unloaded_is_checked_once_that_is_loaded(
    models: OneModel, method: DenoiseMethod
) -> None:
    models.loaded = False
    assert not method.read(denoise())[-1]
    models.loaded = True
    assert method.read(denoise())[-1]


def test_forms_are_bounded(
    method: DenoiseMethod, inference: InferenceMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "MAX_FORMS", 3)
    for images in range(1, 9):
        size = images * 120
        method.read(denoise(x=tensor(shape=(images, *SHAPE), data=bytes(size))))
        inference.read(asked(images=images))
        assert 0 < len(method._forms) <= 3
        assert 0 < len(inference._forms) <= 3


def test_arrays_that_queries_share_are_read_only(
    method: DenoiseMethod, inference: InferenceMethod
) -> None:
    queries = [method.read(denoise())[2] for _ in range(2)]
    queries += [inference.read(asked())[2] for _ in range(2)]
    for first, second in zip(queries[::2], queries[1::2], strict=True):
        assert first.labels is second.labels
        for shared in (first.labels, first.windows, first.level.a, first.level.s):
            assert not shared.flags.writeable


def test_messages_of_one_length_with_their_pixels_in_other_places_are_both_known(
    method: DenoiseMethod,
) -> None:
    """Protobuf allows any order of fields; clients in two languages may differ in it."""
    name, x = pb.DenoiseRequest(model="zeros"), pb.DenoiseRequest(x=denoise().x)
    level = pb.DenoiseRequest(level=pb.NoiseLevel(sigma=[1.0]))
    parts = [each.SerializeToString() for each in (name, x, level)]
    one, other = b"".join(parts), b"".join(reversed(parts))
    assert (one != other, len(one)) == (True, len(other))
    first = form_of(method, pb.DenoiseRequest.FromString(one))
    for data in (other, one, other):
        assert form_of(method, pb.DenoiseRequest.FromString(data)) is first


def test_inferences_share_a_form_whatever_their_id_level_and_parameters(
    inference: InferenceMethod,
) -> None:
    def form(request: oip.ModelInferRequest) -> InferenceForm:
        return inference.read(request)[1]

    first = form(asked())
    named = asked(sigma=2.0)
    named.id = "seven"
    named.parameters["priority"].int64_param = 1
    assert form(named) is first
    assert form(asked(outputs=["score"])) is not first
    assert form(asked(images=2)) is not first


ONE = ("x", "FP32", (1, *SHAPE), bytes(120))
NAN = ("x", "FP32", (1, *SHAPE), np.full(30, np.nan, "<f4").tobytes())


@pytest.mark.parametrize(
    ("known", "inputs", "expected"),
    [
        ((fp32("sigma", 1.0),), (NAN, fp32("sigma", 1.0)), "finite pixels"),
        ((fp32("sigma", 1.0),), (ONE, ("sigma", "FP32", (1,), bytes(3))), "expected 4 bytes"),
        ((fp32("sigma", 1.0),), (ONE, fp32("sigma", -1.0)), "level.sigma"),
        ((fp32("time", 1.0),), (ONE, fp32("time", 2.0)), "level.time"),
        ((fp32("sigma", 1.0), int64("label", 1)), (ONE, fp32("sigma", 1), int64("label", 9)), "9"),
        ((fp32("sigma", 1), int64("window", 3)), (ONE, fp32("sigma", 1), int64("window", 0)), "0"),
    ],
    ids=["pixels", "bytes", "sigma", "time", "label", "window"],
)
def test_a_known_form_of_an_inference_hides_no_error(
    inference: InferenceMethod, known: Any, inputs: Any, expected: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=expected) as new:
        inference.read(infer(*inputs))
    inference.read(infer(ONE, *known))
    assert len(inference._forms) == 1
    with pytest.raises(InvalidArgumentError, match=expected) as again:
        inference.read(infer(*inputs))
    assert str(again.value) == str(new.value)


@pytest.mark.parametrize("name", ["sigma", "alpha_bar", "time"])
def test_every_inference_has_its_own_level(inference: InferenceMethod, name: str) -> None:
    method = {"sigma": from_sigma, "alpha_bar": from_alpha_bar, "time": from_time}[name]
    for value in (0.25, 0.5, 0.75):
        *_, query, checked = inference.read(infer(ONE, fp32(name, value)))
        assert checked
        assert query.level.pairs == method([value]).pairs


def message(answer: Any, form: DenoiseForm, pixels: np.ndarray) -> bytes:
    """Return an answer as protobuf writes it."""
    whole = parent = answer()
    for name in PATHS[answer]:
        parent = getattr(parent, name)
    parent.CopyFrom(tensors.encode_tensor(torch.from_numpy(pixels), form.output_dtype))
    data: bytes = whole.SerializeToString()
    return data


@settings(max_examples=200, deadline=None)
@given(
    answer=st.sampled_from(list(PATHS)),
    dtype=st.sampled_from(DTYPES),
    pixels=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 8), *(st.just(size) for size in SHAPE)),
        elements=st.floats(-1e4, 1e4, width=32),
    ),
    torched=st.booleans(),
)
@pytest.mark.slow
def test_an_answer_is_the_message_that_protobuf_would_write(
    answer: Any, dtype: pb.DType.ValueType, pixels: np.ndarray, torched: bool
) -> None:
    models: Any = OneModel(INFO)
    method = DenoiseMethod(models, LIMITS, answer, *PATHS[answer])
    x = tensor(shape=pixels.shape, data=bytes(pixels.nbytes))
    _, form, _, _ = method.read(denoise(x=x, output_dtype=dtype))
    given = torch.from_numpy(pixels) if torched else pixels
    written = method.write(form, given, Denoised(pixels, None))
    assert written == message(answer, form, pixels)


def test_an_answer_with_evidence_holds_both(method: DenoiseMethod) -> None:
    pixels = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    evidence = np.random.default_rng(1).normal(size=(2, *SHAPE[1:])).astype(np.float32)
    x = tensor(shape=pixels.shape, data=bytes(pixels.nbytes))
    _, form, _, _ = method.read(denoise(x=x, return_log_evidence=True))
    got = pb.DenoiseResponse.FromString(method.write(form, pixels, Denoised(pixels, evidence)))
    assert got.denoised == tensors.encode_tensor(pixels)
    assert got.log_evidence == tensors.encode_tensor(evidence)


OUTPUTS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "denoised": lambda images: (images, *SHAPE),
    "score": lambda images: (images, *SHAPE),
    "log_evidence": lambda images: (images, *SHAPE[1:]),
}


@settings(max_examples=200, deadline=None)
@given(
    images=st.integers(1, 8),
    names=st.lists(st.sampled_from(sorted(OUTPUTS)), unique=True),
    request_id=st.text(max_size=200),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_an_inference_is_the_message_that_protobuf_would_write(
    images: int, names: list[str], request_id: str, seed: int
) -> None:
    models: Any = OneModel(INFO)
    method = InferenceMethod(models, LIMITS)
    request = asked(images=images, outputs=names)
    _, form, _, _ = method.read(request)
    assert form.outputs == (names or ["denoised", "score", "log_evidence"])
    rng = np.random.default_rng(seed)
    contents = [rng.normal(size=OUTPUTS[name](images)).astype("<f4") for name in form.outputs]
    expected = oip.ModelInferResponse(
        model_name=request.model_name, model_version="1", id=request_id
    )
    for name, array in zip(form.outputs, contents, strict=True):
        expected.outputs.add(name=name, datatype="FP32", shape=array.shape)
        expected.raw_output_contents.append(array.tobytes())
    assert form.write(request_id.encode(), contents) == expected.SerializeToString()


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 1 << 31])
@pytest.mark.parametrize("number", [1, 15, 16, 2047, 2048])
def test_a_field_s_head_is_tag_and_length(number: int, size: int) -> None:
    def varint(value: int) -> bytes:
        low, rest = value & 0x7F, value >> 7
        return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])

    assert forms.field_head(number, size) == varint(number << 3 | 2) + varint(size)


def test_a_query_of_a_form_is_the_one_that_would_be_made_without(method: DenoiseMethod) -> None:
    def query(**changes: Any) -> Query:
        return method.read(denoise(**changes))[2]

    plain, spelt_out = query(), query(labels=[-1])
    for one, other in (
        (plain.labels, spelt_out.labels),
        (plain.windows, spelt_out.windows),
        (plain.level.a, spelt_out.level.a),
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
