"""Files of ONNX denoisers: weights that are no number, data outside the graph, the extra."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tests.support.denoisers import random_images
from tests.support.onnx_models import (
    SHAPE,
    ZERO,
    convolution,
    gaussian,
    graph,
    load,
    refusal,
    write,
)

from els_service.denoisers.base import make_query
from els_service.denoisers.engines.exported import load_onnxruntime
from els_service.denoisers.levels import from_sigma
from els_service.errors import LoadError
from els_service.repository import ModelRepository


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT16", "FLOAT", "DOUBLE", "FLOAT8E4M3FN"])
def test_a_weight_that_is_no_number_is_refused_though_a_maximum_hides_it(
    tmp_path: Path, kind: str
) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    weight = numpy_helper.from_array(np.array([np.nan], np.float32).astype(dtype), "weight")
    nodes = [
        helper.make_node("Cast", ["weight"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Max", ["wide", "zero"], ["rectified"]),
        helper.make_node("Add", ["x", "rectified"], ["y"]),
    ]
    error = refusal(tmp_path, graph(nodes, initializers=[weight, ZERO]))
    assert "weight: expected numbers, got NaN" in error.reason


def test_a_constant_node_that_is_no_number_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["c"], value_float=float("nan")),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    assert "value_float: expected numbers, got NaN" in refusal(tmp_path, graph(nodes)).reason


def _external(location: str) -> bytes:
    """Return ``convolution`` with its kernel in a file beside it, at a ``location``."""
    model = convolution()
    (kernel,) = (one for one in model.graph.initializer if one.name == "kernel")
    onnx.external_data_helper.set_external_data(kernel, location, length=len(kernel.raw_data))
    kernel.ClearField("raw_data")
    kernel.data_location = TensorProto.EXTERNAL
    content: bytes = model.SerializeToString()
    return content


def _kernel() -> bytes:
    return random_images((2, 2, 3, 3)).numpy().tobytes()


def test_data_beside_the_file_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, _external("kernel.bin"))
    (folder / "kernel.bin").write_bytes(_kernel())
    query = make_query(random_images((2, *SHAPE)), from_sigma([2.0]))
    want = load(tmp_path / "whole", convolution()).denoise(query).mean
    got = ModelRepository(tmp_path).load("model").denoise(query).mean
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("location", ["../secret.bin", "../../secret.bin", "link.bin", "none", ""])
@pytest.mark.parametrize("deep", [False, True])
def test_data_that_leaves_the_folder_is_refused_wherever_it_is_named(
    tmp_path: Path, location: str, deep: bool
) -> None:
    content = _external(location)
    if deep:
        # In a branch of an If, where only a walk through the whole message finds it.
        inner = onnx.load_model_from_string(content).graph
        del inner.input[:]
        condition = numpy_helper.from_array(np.array(True), "condition")
        node = helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner)
        content = graph([node], initializers=[condition]).SerializeToString()
    folder = write(tmp_path / "models", content)
    for place in (tmp_path / "models", tmp_path):
        (place / "secret.bin").write_bytes(_kernel())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(LoadError, match="kernel: expected external data in") as error:
        ModelRepository(tmp_path / "models").load("model")
    assert repr(location) in str(error.value)


def test_an_absolute_location_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(_kernel())
    error = refusal(tmp_path / "models", _external(str(tmp_path / "secret.bin")))
    assert "kernel: expected external data in" in error.reason


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_onnxruntime.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = refusal(tmp_path, gaussian())
    assert "expected an installation with the extra" in error.reason
