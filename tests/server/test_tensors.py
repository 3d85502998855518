"""Whatever comes is a valid query or an error that says why; tensors come back as they went."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.support.examples import examples
from tests.support.opened import open_denoise, open_inference

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as inference_pb
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo, Query, make_query
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.query_checks import check_query
from els_service.errors import InvalidArgumentError, ResourceExhaustedError
from els_service.server.requests import tensors

SHAPE = (1, 2, 3)
INFO = DenoiserInfo(
    kind="analytic", shape=SHAPE, label_count=3, max_window=5, has_log_evidence=True
)
LIMITS = Limits(max_images=4, max_steps=10, max_message_bytes=1 << 16, max_pixels=1 << 20)
FLOATS: dict[pb.DType.ValueType, torch.dtype] = {
    pb.DTYPE_F32: torch.float32,
    pb.DTYPE_F16: torch.float16,
    pb.DTYPE_BF16: torch.bfloat16,
}

# Mostly what is nearly right: only that reaches the far ends of the code.
sizes = st.one_of(st.integers(0, 4), st.sampled_from([-1, 2**31, 2**62, -(2**63)]))
shapes = st.one_of(st.builds(lambda b: [b, *SHAPE], st.integers(0, 6)), st.lists(sizes, max_size=6))
numbers = st.one_of(st.floats(), st.sampled_from([0.5, 1.0, 2.0]))
levels = st.builds(
    pb.NoiseLevel,
    sigma=st.lists(numbers, max_size=3),
    alpha_bar=st.lists(numbers, max_size=1),
    time=st.lists(numbers, max_size=1),
)
one_level = st.builds(pb.NoiseLevel, sigma=st.lists(st.floats(0.1, 10), min_size=1, max_size=3))
labels = st.lists(st.one_of(st.integers(-1, 3), st.integers(-(2**63), 2**63 - 1)), max_size=3)
windows = st.lists(st.one_of(st.integers(-1, 7), st.integers(-(2**31), 2**31 - 1)), max_size=3)
dtypes: Any = st.sampled_from([0, 1, 2, 3, 4, 5, 99, -1])


@st.composite
def tensor_messages(draw: st.DrawFn) -> pb.Tensor:
    shape, dtype = draw(shapes), draw(dtypes)
    size = {1: 4, 2: 2, 3: 2, 4: 1}.get(dtype, 1) * abs(int(np.prod(shape, dtype=object)))
    data = draw(st.one_of(st.binary(max_size=32), st.just(bytes(min(size, 400)))))
    return pb.Tensor(dtype=dtype, shape=shape, data=data)


requests: Any = st.builds(
    pb.DenoiseRequest,
    x=tensor_messages(),
    level=st.one_of(levels, one_level),
    labels=labels,
    windows=windows,
    output_dtype=dtypes,
    return_log_evidence=st.booleans(),
)


def assert_valid(query: Query) -> None:
    """Check what every denoiser may rely on."""
    count = len(query)
    assert 1 <= count <= LIMITS.max_images
    assert (query.x.dtype, query.x.ndim) == (torch.float32, 4)
    assert query.x.isfinite().all()
    for per_image in (query.x, query.level.a, query.level.s, query.labels, query.windows):
        assert len(per_image) == count
    assert (query.level.sigma > 0).all()
    assert np.isfinite(query.level.sigma).all()
    if query.x.shape[1:] == torch.Size(SHAPE):
        outcome(lambda: check_query(INFO, query))


def outcome(action: Any) -> Any:
    """Return the action's result, or the text of an error that a caller is told."""
    try:
        return action()
    except (InvalidArgumentError, ResourceExhaustedError) as error:
        return str(error)


@examples(200)
@given(request=requests)
@pytest.mark.slow
def test_a_request_is_a_valid_query_or_an_error_with_its_reason(request: pb.DenoiseRequest) -> None:
    result = outcome(lambda: open_denoise(request, INFO, LIMITS))
    if isinstance(result, Query):
        assert_valid(result)


@examples(100)
@given(data=st.binary(max_size=120))
def test_any_bytes_that_parse_are_a_valid_query_or_an_error(data: bytes) -> None:
    request = pb.DenoiseRequest()
    try:
        request.ParseFromString(data)
    except Exception:
        return
    result = outcome(lambda: open_denoise(request, INFO, LIMITS))
    if isinstance(result, Query):
        assert_valid(result)


@st.composite
def inferences(draw: st.DrawFn) -> inference_pb.ModelInferRequest:
    """A sound request, then up to three changes."""
    request, typed = inference_pb.ModelInferRequest(model_name="m"), draw(st.booleans())
    images = draw(st.integers(1, 4))
    arrays_of: dict[str, np.ndarray] = {"x": np.zeros((images, *SHAPE), "<f4")}
    arrays_of[draw(st.sampled_from(["sigma", "alpha_bar", "time"]))] = np.full(1, 0.5, "<f4")
    for name in draw(st.sets(st.sampled_from(["label", "window"]))):
        arrays_of[name] = np.ones(images, "<i8")
    for name, array in arrays_of.items():
        whole = array.dtype == np.int64
        tensor = request.inputs.add(
            name=name, datatype="INT64" if whole else "FP32", shape=array.shape
        )
        if not typed:
            request.raw_input_contents.append(array.tobytes())
        elif whole:
            tensor.contents.int64_contents.extend(array.tolist())
        else:
            tensor.contents.fp32_contents.extend(array.ravel().tolist())
    for change in draw(st.lists(st.sampled_from(sorted(CHANGES)), max_size=3)):
        tensor = request.inputs[draw(st.integers(0, len(request.inputs) - 1))]
        CHANGES[change](draw, request, tensor)
    return request


def _swap_raw(draw: st.DrawFn, request: Any, tensor: Any) -> None:
    if request.raw_input_contents:
        place = draw(st.integers(0, len(request.raw_input_contents) - 1))
        data = draw(st.one_of(st.binary(max_size=64), st.sampled_from([bytes(24), bytes(4)])))
        request.raw_input_contents[place] = data


CHANGES: dict[str, Any] = {
    "name": lambda draw, request, tensor: setattr(
        tensor, "name", draw(st.sampled_from(["x", "sigma", "time", "label", "window", "y", ""]))
    ),
    "datatype": lambda draw, request, tensor: setattr(
        tensor, "datatype", draw(st.sampled_from(["FP32", "INT64", "FP16", "BYTES", ""]))
    ),
    "shape": lambda draw, request, tensor: tensor.shape.__setitem__(slice(None), draw(shapes)),
    "typed": lambda draw, request, tensor: tensor.contents.fp32_contents.extend(
        draw(st.lists(st.floats(width=32), max_size=6))
    ),
    "raw": _swap_raw,
    "another buffer": lambda draw, request, tensor: request.raw_input_contents.append(b""),
    "again": lambda draw, request, tensor: request.inputs.add(name=tensor.name),
    "output": lambda draw, request, tensor: request.outputs.add(
        name=draw(st.sampled_from(["denoised", "score", "mean"]))
    ),
}


@examples(150)
@given(request=inferences())
def test_an_inference_is_a_valid_query_or_an_error_with_its_reason(
    request: inference_pb.ModelInferRequest,
) -> None:
    result = outcome(lambda: open_inference(request, INFO, LIMITS))
    if isinstance(result, Query):
        assert_valid(result)


@pytest.mark.slow
def test_the_fuzz_finds_valid_queries_too() -> None:
    def valid(action: Any) -> bool:
        return isinstance(outcome(action), Query)

    find(requests, lambda request: valid(lambda: open_denoise(request, INFO, LIMITS)))
    find(inferences(), lambda request: valid(lambda: open_inference(request, INFO, LIMITS)))


def pixels_of(message: pb.Tensor) -> np.ndarray:
    shape = tensors.decode_shape(message, len(message.data), "x", LIMITS)
    return tensors.decode_pixels(message.data, message.dtype, "x", shape)


pixels = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=4, max_dims=4, max_side=4),
    elements=st.floats(-1000, 1000, width=32),
)


@given(x=pixels, dtype=st.sampled_from(sorted(FLOATS)))
def test_a_tensor_comes_back_as_it_went_rounded_to_its_dtype(
    x: np.ndarray, dtype: pb.DType.ValueType
) -> None:
    message = tensors.encode_tensor(torch.from_numpy(x), dtype)
    assert message.dtype == dtype
    assert tuple(message.shape) == x.shape
    got = torch.from_numpy(pixels_of(message).copy())
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.from_numpy(x).to(FLOATS[dtype]).float())


@given(x=arrays.arrays(np.uint8, arrays.array_shapes(min_dims=4, max_dims=4, max_side=4)))
def test_bytes_are_pixels_from_minus_one_to_one(x: np.ndarray) -> None:
    message = pb.Tensor(dtype=pb.DTYPE_U8, shape=x.shape, data=x.tobytes())
    got = pixels_of(message)
    np.testing.assert_array_equal(got, x.astype(np.float32) / np.float32(127.5) - 1)


def test_bytes_are_little_endian() -> None:
    message = tensors.encode_tensor(torch.tensor([[[[1.0]]]]))
    assert (message.data, list(message.shape)) == (b"\x00\x00\x80\x3f", [1, 1, 1, 1])
    half = tensors.encode_tensor(torch.tensor([[[[1.0]]]]), pb.DTYPE_F16)
    brain = tensors.encode_tensor(torch.tensor([[[[1.0]]]]), pb.DTYPE_BF16)
    assert (half.data, brain.data) == (b"\x00\x3c", b"\x80\x3f")


def test_f32_pixels_are_a_view_of_the_bytes_and_copied_for_torch() -> None:
    message = pb.Tensor(dtype=pb.DTYPE_F32, shape=[1, 1, 1, 2], data=bytes(8))
    pixels = pixels_of(message)
    assert not pixels.flags.writeable
    query = make_query(pixels, from_sigma([1.0]))
    query.x[:] += 1
    assert (pixels.sum(), query.pixels.sum()) == (0, 2)


@pytest.mark.parametrize("length", [10, 100_000])
def test_the_text_of_an_error_is_short_for_any_input(length: int) -> None:
    error = InvalidArgumentError("x", "e" * length, ["é"] * length)
    assert len(str(error)) < 450
    assert (error.violation.got[-1] == "…") is (len(str(["é"] * length)) > 200)
