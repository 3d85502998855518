"""Noise levels of ONNX denoisers: their forms and types, betas, and schedules of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from onnx import TensorProto, helper
from tests.support.denoisers import random_images
from tests.support.onnx_models import (
    AXES,
    SHAPE,
    graph,
    load,
    refusal,
    scaled,
    value,
)

from els_service.denoisers.base import make_query
from els_service.denoisers.levels import NoiseLevel, from_alpha_bar, from_sigma
from els_service.denoisers.pretrained.time_inputs import betas_of, timesteps_of

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
