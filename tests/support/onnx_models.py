"""Small ONNX graphs and the model folders that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from tests.support.denoisers import random_images

from els_service.denoisers.base import Denoiser
from els_service.errors import LoadError
from els_service.repository import ModelRepository

SHAPE = (2, 4, 5)
DOCUMENT: dict[str, Any] = {
    "kind": "onnx",
    "file": "net.onnx",
    "input": "x",
    "output": "y",
    "level": {"input": "sigma"},
}


def value(name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def constant(name: str, array: Any) -> Any:
    return numpy_helper.from_array(np.asarray(array, np.float32), name)


def graph(
    nodes: list[Any],
    inputs: list[Any] | None = None,
    initializers: Sequence[Any] = (),
    output: Sequence[int | str] = ("B", *SHAPE),
    domains: Sequence[str] = (),
) -> Any:
    """Return a model whose inputs are x [B, 2, 4, 5] and sigma [B] by default."""
    inputs = inputs or [value("x", ("B", *SHAPE)), value("sigma", ("B",))]
    made = helper.make_graph(nodes, "net", inputs, [value("y", output)], list(initializers))
    opsets = [helper.make_opsetid(domain, 1) for domain in domains]
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 18), *opsets], ir_version=10
    )


ZERO = constant("zero", 0)
AXES = numpy_helper.from_array(np.array([1, 2, 3]), "axes")
COLUMN = helper.make_node("Unsqueeze", ["sigma", "axes"], ["column"])


def gaussian() -> Any:
    """Return D(x) = x / (1 + σ²): the denoiser of N(0, 1), for x = x0 + σ·ε."""
    nodes = [
        COLUMN,
        helper.make_node("Mul", ["column", "column"], ["square"]),
        helper.make_node("Add", ["square", "one"], ["sum"]),
        helper.make_node("Div", ["x", "sum"], ["y"]),
    ]
    return graph(nodes, initializers=[AXES, constant("one", 1)])


def scaled(by: str = "column") -> Any:
    """Return x times what it is given of the level."""
    return graph([COLUMN, helper.make_node("Mul", ["x", by], ["y"])], initializers=[AXES])


def write(root: Path, model: Any, **fields: Any) -> Path:
    folder = root / "model"
    folder.mkdir(parents=True)
    (folder / "model.yaml").write_text(yaml.safe_dump(DOCUMENT | fields))
    (folder / "net.onnx").write_bytes(
        model if isinstance(model, bytes) else model.SerializeToString()
    )
    return folder


def convolution() -> Any:
    """Return a smoothed x, times what it is given of the level."""
    kernel = random_images((2, 2, 3, 3)).numpy()
    node = helper.make_node("Conv", ["x", "kernel"], ["smooth"], pads=[1, 1, 1, 1])
    return graph(
        [COLUMN, node, helper.make_node("Mul", ["smooth", "column"], ["y"])],
        initializers=[AXES, constant("kernel", kernel)],
    )


def load(root: Path, model: Any, **fields: Any) -> Denoiser:
    """Write a model folder and load it."""
    write(root, model, **fields)
    return ModelRepository(root).load("model")


def refusal(root: Path, model: Any, **fields: Any) -> LoadError:
    """Return the error with which a model folder is rejected."""
    with pytest.raises(LoadError) as caught:
        load(root, model, **fields)
    return caught.value
