from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from els_client import ElsError, InvalidArgumentError, Query
from els_client import _codec as codec
from els_client._sample_codec import encode_sample
from els_proto.denoise.v1 import denoise_pb2 as pb

SAMPLE: dict[str, Any] = {
    "model": "m",
    "count": 1,
    "seed": 0,
    "steps": 20,
    "sampler": "ddim",
    "label": None,
    "window": None,
    "eta": 0.0,
    "churn": 0.0,
    "want": (),
}


@pytest.mark.parametrize(
    ("given", "dtype", "sent"),
    [
        ("<f4", pb.DTYPE_F32, "<f4"),
        (">f4", pb.DTYPE_F32, "<f4"),
        ("<f8", pb.DTYPE_F32, "<f4"),
        ("<f2", pb.DTYPE_F16, "<f2"),
        ("u1", pb.DTYPE_U8, "u1"),
    ],
)
def test_pixels_travel_little_endian_in_c_order(given: str, dtype: int, sent: str) -> None:
    x = np.arange(24).reshape(1, 2, 3, 4).astype(given).transpose(0, 1, 3, 2)
    tensor = codec.encode_tensor(x)
    assert (tensor.dtype, list(tensor.shape)) == (dtype, [1, 2, 4, 3])
    np.testing.assert_array_equal(np.frombuffer(tensor.data, sent), x.ravel())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[1.0]], "x: expected a numpy array, got list"),
        (np.zeros((28, 28)), r"x: expected shape \[B, C, H, W\], got shape \[28, 28\]"),
        (np.zeros((1, 28, 28)), r"got shape \[1, 28, 28\]"),
        (np.zeros((1, 1, 2, 2), np.int64), "expected float16, float32, float64 or uint8, got int"),
    ],
)
def test_what_is_no_batch_of_images_is_refused_not_reshaped(x: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        codec.encode_tensor(x)
    assert [violation.field for violation in caught.value.violations] == ["x"]


@pytest.mark.parametrize(
    ("levels", "got"),
    [
        ((None, None, None), "none"),
        ((1.0, 0.5, None), "sigma and alpha_bar"),
        ((0.0, None, 0.0), "sigma and time"),
    ],
)
def test_exactly_one_level_must_be_named(levels: tuple[Any, Any, Any], got: str) -> None:
    with pytest.raises(ValueError, match=f"exactly one of sigma, alpha_bar and time, got {got}"):
        codec.encode_level(*levels)


def test_a_level_is_one_number_or_a_list() -> None:
    assert codec.encode_level(2, None, None) == pb.NoiseLevel(sigma=[2.0])
    assert codec.encode_level(None, np.array([0.1, 0.9]), None).alpha_bar == [0.1, 0.9]
    with pytest.raises(InvalidArgumentError, match=r"sigma: .* got shape \[1, 2\]"):
        codec.encode_level(np.ones((1, 2)), None, None)
    with pytest.raises(InvalidArgumentError, match="time: expected numbers"):
        # Wrong on purpose.
        codec.encode_level(None, None, "0.5")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sampler", "lms", "sampler: expected one of ddim, ddim_released, ddpm, heun, euler"),
        ("want", ("y",), "want: expected any of"),
        ("seed", -1, "seed: expected 0 to"),
        ("seed", 2**64, "seed: expected 0 to"),
        ("count", 0, "count: expected at least 1, got 0"),
        ("label", [0.5], "label: expected integers"),
        ("label", 2**70, "label: expected integers"),
    ],
)
def test_what_the_wire_cannot_say_is_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        encode_sample(**SAMPLE | {name: value})


def test_eta_of_nothing_is_left_to_the_server_and_of_zero_is_sent() -> None:
    assert encode_sample(**SAMPLE).HasField("eta")
    assert not encode_sample(**SAMPLE | {"eta": None}).HasField("eta")
    assert not encode_sample(model="m", sampler="ddpm").HasField("eta")


def test_the_largest_seed_and_an_empty_list_of_labels_are_legal() -> None:
    request = encode_sample(**SAMPLE | {"seed": 2**64 - 1, "label": []})
    assert request.seed == 2**64 - 1
    assert not request.labels


@pytest.mark.parametrize(
    "tensor",
    [
        pb.Tensor(),
        pb.Tensor(dtype=pb.DTYPE_F16, shape=[2], data=bytes(4)),
        pb.Tensor(dtype=pb.DTYPE_F32, shape=[2], data=bytes(4)),
    ],
)
def test_an_answer_that_is_no_f32_tensor_is_an_error_of_ours(tensor: pb.Tensor) -> None:
    with pytest.raises(ElsError, match="malformed tensor") as caught:
        codec.decode_tensor(tensor)
    assert caught.value.code == "INTERNAL"


@pytest.mark.parametrize(
    "wrong",
    [{"window": 2**40 + 1}, {"model": 3}, {"label": [2**70]}],
    ids=["window", "model", "label"],
)
def test_what_no_message_can_hold_is_an_error_of_our_own(wrong: dict[str, Any]) -> None:
    query = Query(np.zeros((1, 1, 2, 2)), **{"model": "m", "sigma": 1.0, **wrong})
    with pytest.raises(InvalidArgumentError):
        codec.encode_query(pb.DenoiseRequest, query)


CONDITION = np.zeros((1, 2, 3), np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": CONDITION[0]}, r"conditioning: expected shape \[1 or B, T, W\], got"),
        ({"conditioning": [[[0.0]]]}, "conditioning: expected a numpy array, got list"),
        (
            {"unconditional": CONDITION.astype(np.uint8)},
            "unconditional: expected float16, float32 or float64, got uint8",
        ),
        ({"guidance": 0}, "guidance: expected a number other than 0"),
        ({"guidance": "much"}, "request: "),
    ],
)
def test_conditions_that_cannot_be_sent_are_refused_by_field(
    options: dict[str, Any], message: str
) -> None:
    query = Query(np.zeros((1, 1, 2, 2)), model="m", sigma=1.0, **options)
    with pytest.raises(InvalidArgumentError, match=message):
        codec.encode_query(pb.ScoreRequest, query)
    with pytest.raises(InvalidArgumentError, match=message):
        encode_sample(**SAMPLE | options)


def test_conditions_travel_and_none_are_left_out() -> None:
    query = Query(np.zeros((1, 1, 2, 2)), model="m", sigma=1.0)
    bare = codec.encode_query(pb.DenoiseRequest, query)
    assert not bare.HasField("conditioning")
    assert not bare.HasField("unconditional")
    given = {"conditioning": CONDITION, "unconditional": CONDITION + 1, "guidance": 2}
    request = encode_sample(**SAMPLE | given | {"want": ("decoded",)})
    assert list(request.conditioning.shape) == [1, 2, 3]
    assert np.frombuffer(request.unconditional.data, "<f4").tolist() == [1.0] * 6
    assert (request.guidance, request.return_decoded, request.return_x) == (2.0, True, False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"explain_steps": [10**12]}, "explain_steps: expected an integer of at most 2147483647"),
        ({"explain_steps": [2, 0]}, "explain_steps: expected an integer of at least 1, got 0"),
        ({"explain_top": "3"}, "explain_top: expected an integer of at least 1, got '3'"),
        ({"explain_images": 10**12}, "explain_images: expected an integer of at most 2147483647"),
    ],
)
def test_a_number_that_no_request_can_have_is_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        encode_sample(model="fashion-els", steps=3, **options)
