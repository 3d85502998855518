"""ONNX denoisers: small graphs made here, served as they are, refused by name where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from tests.support.denoisers import random_images
from tests.support.onnx_models import (
    AXES,
    COLUMN,
    SHAPE,
    ZERO,
    constant,
    convolution,
    gaussian,
    graph,
    load,
    refusal,
    scaled,
    value,
)

from els_service.denoisers.base import make_query
from els_service.denoisers.levels import NoiseLevel, from_alpha_bar, from_sigma
from els_service.errors import ElsError, InvalidArgumentError


def test_a_graph_that_answers_d_answers_so_at_any_level(tmp_path: Path) -> None:
    denoiser = load(tmp_path, gaussian())
    assert (denoiser.info.kind, denoiser.info.shape) == ("onnx", SHAPE)
    x = random_images((4, *SHAPE))
    a, s = np.array([1.0, 0.3, 1.0, 2.0]), np.array([0.5, 0.9, 70.0, 2.0])
    got = denoiser.denoise(make_query(x, NoiseLevel(a, s))).mean
    want = x * torch.from_numpy(a / (a**2 + s**2)).view(-1, 1, 1, 1)
    torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("told", "at"),
    [
        ("sigma", lambda sigma: sigma),
        ("log_sigma", np.log),
        ("alpha_bar", lambda sigma: 1 / (1 + sigma**2)),
        ("time", lambda sigma: np.arctan(sigma) * 2 * 1.008 / np.pi),
    ],
)
@pytest.mark.parametrize("scaling", ["exploding", "preserving"])
def test_a_graph_is_told_the_level_as_it_wants_and_given_x_in_its_scale(
    tmp_path: Path, told: str, at: Any, scaling: str
) -> None:
    level = {"input": "sigma", "as": told, "range": [0.01, 50.0]}
    denoiser = load(tmp_path, scaled(), level=level, scaling=scaling)
    x = random_images((2, *SHAPE))
    sigma = np.array([0.001, 3.0])
    got = denoiser.denoise(make_query(x, from_alpha_bar(1 / (1 + sigma**2)))).mean
    scale = np.sqrt(1 + sigma**2) if scaling == "exploding" else np.ones(2)
    want = x * torch.from_numpy(at(np.maximum(sigma, 0.01)) * scale).view(-1, 1, 1, 1)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_predictions_of_noise_and_velocity_become_d(tmp_path: Path, prediction: str) -> None:
    denoiser = load(
        tmp_path,
        graph([COLUMN, helper.make_node("Add", ["x", "column"], ["y"])], initializers=[AXES]),
        prediction=prediction,
        scaling="preserving",
    )
    alpha_bar = np.array([0.2, 0.9])
    x = random_images((2, *SHAPE))
    a = torch.from_numpy(np.sqrt(alpha_bar)).view(-1, 1, 1, 1)
    s = torch.from_numpy(np.sqrt(1 - alpha_bar)).view(-1, 1, 1, 1)
    output = x + s / a
    want = (x - s * output) / a if prediction == "eps" else a * x - s * output
    got = denoiser.denoise(make_query(x, from_alpha_bar(alpha_bar))).mean
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


def test_further_inputs_are_constants_and_labels_the_callers(tmp_path: Path) -> None:
    inputs = [
        value("x", ("B", *SHAPE)),
        value("sigma", ("B", 1), TensorProto.DOUBLE),
        value("label", ("B", 1, 1, 1), TensorProto.INT64),
        value("shift", ("B", *SHAPE[:1], 1, 1)),
        value("factor", ("B", 1, 1, 1)),
    ]
    nodes = [
        helper.make_node("Cast", ["label"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "factor"], ["product"]),
        helper.make_node("Add", ["product", "shift"], ["sum"]),
        helper.make_node("Add", ["sum", "number"], ["y"]),
    ]
    denoiser = load(
        tmp_path,
        graph(nodes, inputs),
        label={"input": "label", "count": 5},
        constants={"factor": 2.0, "shift": [0.25, -0.5]},
    )
    assert denoiser.info.label_count == 5
    x = random_images((3, *SHAPE))
    query = make_query(x, from_sigma([1.0]), [4, 0, 2])
    denoiser.check(query)
    shift = torch.tensor([0.25, -0.5]).view(1, 2, 1, 1)
    want = 2 * x + shift + torch.tensor([4.0, 0, 2]).view(-1, 1, 1, 1)
    torch.testing.assert_close(denoiser.denoise(query).mean, want)
    with pytest.raises(InvalidArgumentError, match="requires a label"):
        denoiser.check(make_query(x, from_sigma([1.0])))


def test_a_deterministic_graph_gives_the_same_bits_alone_and_in_a_batch(tmp_path: Path) -> None:
    denoiser = load(tmp_path, convolution(), deterministic=True)
    assert denoiser.info.batch_invariant
    query = make_query(random_images((21, *SHAPE)), from_sigma(np.geomspace(0.1, 10, 21)))
    together = denoiser.denoise(query).pixels
    for i in range(21):
        np.testing.assert_array_equal(
            together[i : i + 1], denoiser.denoise(query[i : i + 1]).pixels
        )


def test_a_graph_of_one_batch_size_is_filled_up(tmp_path: Path) -> None:
    fixed = convolution()
    for node in (*fixed.graph.input, *fixed.graph.output):
        node.type.tensor_type.shape.dim[0].dim_value = 4
    query = make_query(random_images((6, *SHAPE)), from_sigma(np.arange(1.0, 7)))
    got = load(tmp_path / "fixed", fixed).denoise(query).mean
    torch.testing.assert_close(got, load(tmp_path / "open", convolution()).denoise(query).mean)


def test_a_shape_that_the_graph_leaves_open_is_told_and_one_it_fixes_is_kept(
    tmp_path: Path,
) -> None:
    inputs = [value("x", ("B", 2, "H", "W")), value("sigma", ("B",))]
    nodes = [COLUMN, helper.make_node("Mul", ["x", "column"], ["y"])]
    model = graph(nodes, inputs, [AXES], ("B", 2, "H", "W"))
    assert load(tmp_path / "a", model, shape=[2, 3, 9]).info.shape == (2, 3, 9)
    assert "shape: expected [C, H, W], as the graph" in refusal(tmp_path / "b", model).reason
    error = refusal(tmp_path / "c", model, shape=[3, 3, 9])
    assert "shape: expected [2, 'H', 'W'], as in the graph, got [3, 3, 9]" in error.reason


def test_an_answer_that_is_no_number_is_an_error_not_an_answer(tmp_path: Path) -> None:
    nodes = [
        COLUMN,
        helper.make_node("Log", ["x"], ["log"]),
        helper.make_node("Mul", ["x", "column"], ["large"]),
        helper.make_node("Where", ["above", "log", "large"], ["y"]),
        helper.make_node("Less", ["x", "bound"], ["above"]),
    ]
    nodes = [*nodes[:3], nodes[4], nodes[3]]
    model = graph(nodes, initializers=[AXES, constant("bound", -3)])
    denoiser = load(tmp_path, model)
    fine = make_query(torch.ones(1, *SHAPE), from_sigma([1.0]))
    assert np.isfinite(denoiser.denoise(fine).pixels).all()
    with pytest.raises(ElsError, match="y: the graph returned NaN or infinity"):
        denoiser.denoise(make_query(torch.full((1, *SHAPE), -5.0), from_sigma([1.0])))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"input": "noisy"}, "inputs: expected noisy among them, got ['sigma', 'x']"),
        ({"output": "z"}, "outputs: expected z among them, got ['y']"),
        ({"level": {"input": "x"}}, "sigma: expected a value in constants"),
        ({"constants": {"difficulty": 1.0}}, "inputs: expected difficulty among them"),
        ({"constants": {"sigma": 1.0}}, "inputs: expected each input used once"),
        ({"label": {"input": "x", "count": 1}}, "inputs: expected each input used once"),
        ({"level": {"input": "sigma", "as": "noise"}}, "level.as"),
        ({"level": {"input": "sigma", "range": [1.0, 1.0]}}, "level.range: expected two"),
        ({"prediction": "edm"}, "prediction"),
        ({"file": "other.onnx"}, "expected a file, found none"),
        ({"file": "../../net.onnx"}, "expected a file inside the models root"),
        ({"shape": [2, 4]}, "shape"),
    ],
)
def test_a_document_that_does_not_fit_the_graph_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    error = refusal(tmp_path / "models", scaled(), **fields)
    assert reason in str(error)


def _wide(output: str = "y") -> Any:
    node = helper.make_node("Concat", ["x", "x"], [output], axis=1)
    return graph([COLUMN, node], initializers=[AXES], output=("B", 4, 4, 5))


def _infinite() -> Any:
    return graph([COLUMN, helper.make_node("Div", ["x", "zero"], ["y"])], None, [AXES, ZERO])


CUSTOM = graph(
    [helper.make_node("Magic", ["x"], ["y"], domain="evil", name="first")], domains=["evil"]
)
NOT_A_NUMBER = graph(
    [helper.make_node("Add", ["x", "weight"], ["y"])], initializers=[constant("weight", np.nan)]
)
FLAT = graph(
    [helper.make_node("Identity", ["x"], ["y"])],
    [value("x", ("B", 40)), value("sigma", ("B",))],
    output=("B", 40),
)
TEXTS = graph(
    [helper.make_node("Identity", ["x"], ["y"])],
    [value("x", ("B", *SHAPE)), value("sigma", ("B",), TensorProto.STRING)],
)
INTEGERS = graph(
    [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)],
    [value("x", ("B", *SHAPE), TensorProto.INT64), value("sigma", ("B",))],
)
INTEGER_ANSWER = graph([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64)])
INTEGER_ANSWER.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (CUSTOM, "expected operators of ONNX or onnxruntime, got evil.Magic in node first"),
        (NOT_A_NUMBER, "weight: expected numbers, got NaN"),
        (_infinite(), "failed at its first run: y: the graph returned NaN or infinity"),
        (_wide(), "y: expected shape [1, 2, 4, 5], got [1, 4, 4, 5]"),
        (FLAT, "x: expected [B, C, H, W]"),
        (TEXTS, "sigma: expected one of tensor(float)"),
        (INTEGERS, "x: expected one of tensor(float), tensor(double), tensor(float16), got"),
        (INTEGER_ANSWER, "y: expected one of tensor(float), tensor(double), tensor(float16), got"),
        (b"\x80\x04}q\x00.", "expected a readable ONNX file"),
        (b"", "onnxruntime rejects the graph"),
    ],
)
def test_a_graph_that_no_denoiser_can_be_is_refused_by_name(
    tmp_path: Path, model: Any, reason: str
) -> None:
    error = refusal(tmp_path, model)
    assert error.path == str(tmp_path / "model" / "net.onnx")
    assert reason in error.reason
