"""Arrays of other libraries are accepted wherever numpy's are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from els_client import InvalidArgumentError, Query
from els_client import _codec as codec
from els_client._sample_codec import encode_sample
from els_proto.denoise.v1 import denoise_pb2 as pb

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 1, 2, 2)


class Shared:
    """An array that offers DLPack and nothing else, as some libraries' do."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class Wrapped:
    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._array


@pytest.mark.parametrize(
    "x",
    [
        torch.from_numpy(X),
        torch.from_numpy(X).requires_grad_(),
        torch.nn.Parameter(torch.from_numpy(X)),
        torch.from_numpy(X).permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        Shared(X),
        Wrapped(X),
    ],
    ids=["tensor", "gradient", "parameter", "strided", "dlpack", "array"],
)
def test_an_array_of_another_library_travels_as_numpys_does(x: Any) -> None:
    assert codec.encode_tensor(x) == codec.encode_tensor(X)


@pytest.mark.parametrize(
    ("dtype", "sent"),
    [
        (torch.float16, pb.DTYPE_F16),
        (torch.float64, pb.DTYPE_F32),
        (torch.bfloat16, pb.DTYPE_F32),
        (torch.uint8, pb.DTYPE_U8),
    ],
)
def test_tensors_of_other_types_keep_their_values(dtype: torch.dtype, sent: int) -> None:
    x = torch.arange(8).reshape(2, 1, 2, 2).to(dtype)
    tensor = codec.encode_tensor(x)
    layout = {pb.DTYPE_F16: "<f2", pb.DTYPE_F32: "<f4", pb.DTYPE_U8: "u1"}[tensor.dtype]
    assert tensor.dtype == sent
    assert np.frombuffer(tensor.data, layout).tolist() == list(range(8))


def test_a_tensor_that_numpy_cannot_read_is_named() -> None:
    x = torch.empty((1, 1, 2, 2), device="meta")
    with pytest.raises(InvalidArgumentError, match="x: expected an array that numpy can read, got"):
        codec.encode_tensor(x)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 1, 1, 1)])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_levels_and_labels_broadcast_as_they_would_with_the_images(
    shape: tuple[int, ...], kind: Any
) -> None:
    query = Query(
        X,
        model="m",
        sigma=kind(np.reshape([0.5, 2.0], shape)),
        label=kind(np.reshape([1, -1], shape)),
    )
    request = codec.encode_query(pb.DenoiseRequest, query)
    assert (list(request.level.sigma), list(request.labels)) == ([0.5, 2.0], [1, -1])


def test_a_level_for_each_pixel_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"sigma: .* got shape \[2, 1, 2, 2\]"):
        codec.encode_level(torch.ones(2, 1, 2, 2), None, None)


def test_tensors_of_one_number_are_numbers() -> None:
    levels: list[Any] = [torch.tensor(0.5, requires_grad=True), torch.tensor(2.0)]
    assert list(codec.encode_level(levels, None, None).sigma) == [0.5, 2.0]
    given: dict[str, Any] = {
        name: torch.tensor(number)
        for name, number in (("seed", 7), ("count", 2), ("steps", 3), ("first_image", 5))
    }
    request = encode_sample(model="m", **given)
    assert (request.seed, request.count, request.steps, request.first_image) == (7, 2, 3, 5)
    with pytest.raises(InvalidArgumentError, match=r"seed: expected an integer, got 1\.5"):
        encode_sample(model="m", seed=1.5)  # type: ignore[arg-type]  # what is tested
