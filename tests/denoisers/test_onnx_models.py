"""ONNX denoisers: small graphs made here, served as they are, refused by name where they lie."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDPMScheduler
from onnx import TensorProto, helper, numpy_helper
from tests.support.denoisers import random_images
from tests.support.onnx_models import (
    AXES,
    COLUMN,
    SHAPE,
    constant,
    gaussian,
    graph,
    scaled,
    value,
    write,
)

from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.levels import NoiseLevel, from_alpha_bar, from_sigma
from els_service.denoisers.pretrained.time_inputs import betas_of, timesteps_of
from els_service.errors import ElsError, InvalidArgumentError, LoadError
from els_service.repository import ModelRepository


def load(root: Path, model: Any, **fields: Any) -> Denoiser:
    write(root, model, **fields)
    return ModelRepository(root).load("model")


def refusal(root: Path, model: Any, **fields: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load(root, model, **fields)
    return caught.value


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


def convolution() -> Any:
    kernel = random_images((2, 2, 3, 3)).numpy()
    node = helper.make_node("Conv", ["x", "kernel"], ["smooth"], pads=[1, 1, 1, 1])
    return graph(
        [COLUMN, node, helper.make_node("Mul", ["smooth", "column"], ["y"])],
        initializers=[AXES, constant("kernel", kernel)],
    )


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


ZERO = constant("zero", 0)
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
        (b"", "onnxruntime rejects it"),
    ],
)
def test_a_graph_that_no_denoiser_can_be_is_refused_by_name(
    tmp_path: Path, model: Any, reason: str
) -> None:
    error = refusal(tmp_path, model)
    assert error.path == str(tmp_path / "model" / "net.onnx")
    assert reason in error.reason


LEVEL_FORMS = ("sigma", "log_sigma", "alpha_bar", "time")


def _typed(kind: int, shape: tuple[int | str, ...] = ("B",)) -> Any:
    """Return y = x + level in float32, whose level has another type and shape."""
    inputs = [value("x", ("B", *SHAPE)), value("sigma", shape, kind)]
    nodes = [helper.make_node("Cast", ["sigma"], ["number"], to=TensorProto.FLOAT)]
    if shape == ("B",):
        nodes.append(helper.make_node("Unsqueeze", ["number", "axes"], ["column"]))
    last = "column" if shape == ("B",) else "number"
    nodes.append(helper.make_node("Add", ["x", last], ["y"]))
    return graph(nodes, inputs, [AXES] if shape == ("B",) else [])


@pytest.mark.parametrize("form", LEVEL_FORMS)
@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
def test_an_integer_level_that_would_be_truncated_is_refused_by_name(
    tmp_path: Path, form: str, kind: int
) -> None:
    error = refusal(tmp_path, _typed(kind), level={"input": "sigma", "as": form})
    assert f"sigma: expected a float for level.as {form}" in error.reason
    assert "level.as timestep), got int" in error.reason


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (TensorProto.INT64, 0.5),
        (TensorProto.INT32, 2.0**40),
        (TensorProto.FLOAT16, 1e6),
        (TensorProto.FLOAT16, 1e-8),
        (TensorProto.FLOAT, 1e39),
        (TensorProto.FLOAT, float("nan")),
    ],
)
def test_a_constant_that_its_input_cannot_hold_is_refused_by_name(
    tmp_path: Path, kind: int, number: float
) -> None:
    inputs = [value("x", ("B", *SHAPE)), value("sigma", ("B",)), value("c", ("B",), kind)]
    model = graph([helper.make_node("Identity", ["x"], ["y"])], inputs)
    assert (
        "constants.c: expected values that"
        in refusal(tmp_path, model, constants={"c": number}).reason
    )


def test_a_level_or_label_too_large_for_its_type_is_refused_by_name(tmp_path: Path) -> None:
    level = {"input": "sigma", "range": [0.01, 1e5]}
    error = refusal(tmp_path / "a", _typed(TensorProto.FLOAT16), level=level)
    assert "sigma: expected a type that holds sigma from 0.01 to 100000" in error.reason
    inputs = [value("x", ("B", *SHAPE)), value("sigma", ("B",))]
    node = [helper.make_node("Identity", ["x"], ["y"])]
    half = graph(node, [*inputs, value("label", ("B",), TensorProto.FLOAT16)])
    error = refusal(tmp_path / "b", half, label={"input": "label", "count": 5000})
    assert "label: expected a type that holds labels to 4999" in error.reason
    one = graph(node, [*inputs, value("label", (), TensorProto.INT64)])
    error = refusal(tmp_path / "c", one, label={"input": "label", "count": 5})
    assert "label: expected a value for each image, [B], got one value for all" in error.reason


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.FLOAT])
@pytest.mark.parametrize("shape", [("B",), (1,), ()])
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2", "numbers"])
def test_an_export_of_ddpm_answers_as_their_scheduler_does(
    tmp_path: Path, kind: int, shape: tuple[int | str, ...], betas: str
) -> None:
    fields = {"beta_start": 1e-3, "beta_end": 0.12} if betas == "linear" else {}
    theirs = DDPMScheduler(
        num_train_timesteps=100,
        beta_schedule="linear" if betas == "numbers" else betas,
        clip_sample=False,
        **fields,
    )
    numbers: Any = theirs.betas.tolist() if betas == "numbers" else betas
    level = {"input": "sigma", "as": "timestep", "betas": numbers, "timesteps": 100, **fields}
    denoiser = load(tmp_path, _typed(kind, shape), level=level)
    assert denoiser.info.schedule == "timesteps"
    timesteps = torch.tensor([99, 40, 40, 0])
    alpha_bar = theirs.alphas_cumprod[timesteps].double().numpy()
    x = random_images((4, *SHAPE))
    got = denoiser.denoise(make_query(x, from_alpha_bar(alpha_bar))).mean
    for i, timestep in enumerate(timesteps):
        sample = x[i : i + 1]
        taken = theirs.step(sample + timestep, int(timestep), sample)
        torch.testing.assert_close(got[i : i + 1], taken.pred_original_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_between_timesteps_a_float_level_is_a_fraction_and_an_integer_the_nearest(
    tmp_path: Path, whole: bool
) -> None:
    level = {"input": "sigma", "as": "timestep", "betas": "scaled_linear"}
    kind = TensorProto.INT64 if whole else TensorProto.FLOAT
    denoiser = load(tmp_path, _typed(kind), level=level, prediction="x0")
    alpha_bar = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod.double().numpy()
    log_sigma = np.log(1 / alpha_bar - 1) / 2
    between = float(0.7 * log_sigma[40] + 0.3 * log_sigma[41])
    x = torch.zeros(1, *SHAPE)
    got = denoiser.denoise(make_query(x, from_sigma([np.exp(between)]))).mean
    assert float(got.mean()) == pytest.approx(40 if whole else 40.3, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_a_named_beta_schedule_is_that_of_diffusers(kind: str) -> None:
    want = DDPMScheduler(beta_schedule=kind).alphas_cumprod.double().numpy()
    sigma = timesteps_of(betas_of(kind, 1000)).sigma
    np.testing.assert_array_equal(sigma, np.sqrt((1 - want) / want))


@pytest.mark.parametrize("count", [1, 1000])
def test_an_export_of_a_flow_answers_with_the_end_of_its_straight_path(
    tmp_path: Path, count: int
) -> None:
    level = {"input": "sigma", "as": "flow", "timesteps": count, "shift": 3.0}
    denoiser = load(tmp_path, _typed(TensorProto.FLOAT), level=level)
    t = np.array([0.9, 0.25])
    x, column = random_images((2, *SHAPE)), torch.from_numpy(t).float().view(-1, 1, 1, 1)
    # x = (1-t)·x0 + t·ε and F = x + count·t is the velocity ε - x0, so x0 = x - t·F.
    got = denoiser.denoise(make_query(x, NoiseLevel(1 - t, t))).mean
    torch.testing.assert_close(got, x - column * (x + count * column), rtol=1e-5, atol=1e-4)
    levels = denoiser.info.levels(np.array([0.5]))
    assert levels.sigma[0] == pytest.approx(3.0)  # shift 3: t = 1/2 becomes 3/4


@pytest.mark.parametrize(
    ("level", "reason"),
    [
        ({"as": "timestep"}, "level.betas: expected one of linear, scaled_linear"),
        ({"as": "timestep", "betas": "cosine"}, "level.betas"),
        ({"as": "timestep", "betas": [0.5, 2.0]}, "level.betas"),
        ({"as": "timestep", "betas": [0.5]}, "level.betas: expected 2 to 100000 numbers"),
        ({"as": "timestep", "betas": [0.1, 0.2], "timesteps": 3}, "level.timesteps: expected 2"),
        ({"as": "timestep", "betas": "linear", "range": [1.0, 2.0]}, "level.range: expected none"),
        ({"as": "sigma", "betas": "linear"}, "level.betas: expected none for level.as sigma"),
        ({"as": "flow", "beta_start": 0.1}, "level.beta_start: expected none for level.as flow"),
        ({"as": "timestep", "betas": "linear", "shift": 2.0}, "level.shift: expected none"),
        (
            {"as": "timestep", "betas": "linear", "beta_start": 0.02, "beta_end": 0.0001},
            "level.beta_end: expected at least 0.02, the beta_start, got 0.0001",
        ),
        (
            {"as": "timestep", "betas": [0.1, 0.2], "beta_end": 0.2},
            "level.beta_end: expected none beside the numbers of level.betas",
        ),
    ],
)
def test_a_level_whose_fields_do_not_fit_is_refused_by_field(
    tmp_path: Path, level: dict[str, Any], reason: str
) -> None:
    error = refusal(tmp_path, scaled(), level={"input": "sigma", **level})
    assert reason in error.reason


def test_an_integer_time_of_flow_from_0_to_1_is_refused(tmp_path: Path) -> None:
    model = _typed(TensorProto.INT64)
    error = refusal(tmp_path, model, level={"input": "sigma", "as": "flow"})
    assert "level.timesteps: expected more than 1, as the graph takes integers" in error.reason


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
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = refusal(tmp_path, gaussian())
    assert "expected an installation with the extra" in error.reason
