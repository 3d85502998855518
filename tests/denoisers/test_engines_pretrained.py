"""Engines of networks of diffusers and of ONNX graphs: the answers of their own, or a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from diffusers import DiTTransformer2DModel
from onnx import TensorProto, helper
from tests.support import pretrained
from tests.support.denoisers import random_images
from tests.support.onnx_models import AXES, COLUMN, SHAPE, constant, graph, value, write

from els_service.denoisers.base import Condition, Denoiser, make_query
from els_service.denoisers.engines.options import EngineDefaults
from els_service.denoisers.levels import from_sigma
from els_service.errors import LoadError
from els_service.repository import ModelRepository

# Some of their schedulers convert tensors as numpy 1 did.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BUDGET = 1e-5
BUCKETS = "execution: {buckets: [2]}\n"
"""Fewer than are compiled without."""
SIGMA = np.array([0.05, 3.0, 0.5, 10.0, 0.3])


def error(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> float:
    """Relative error of the worst image."""
    flat, wanted = got.reshape(len(got), -1), want.reshape(len(want), -1)
    return float((np.linalg.norm(flat - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


LIBRARIES = ("openvino", "onnxruntime")


def both(folder: Path, engine: str = "openvino") -> tuple[Denoiser, Denoiser]:
    """The model of a folder by its own engine and by a library, which must not fall back."""
    models = ModelRepository(folder.parent)
    strict = EngineDefaults(engine=engine, fallback=False)
    converted = ModelRepository(folder.parent, engines=strict).load(folder.name)
    assert converted.info.engine == engine
    assert converted.info.precision_error < BUDGET
    return models.load(folder.name), converted


def dit() -> Any:
    network: Any = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
    )
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("engine", LIBRARIES)
@pytest.mark.parametrize("make", [lambda: pretrained.unet(num_class_embeds=3), dit])
@pytest.mark.slow
def test_a_library_answers_as_diffusers_with_labels_and_their_guidance(
    tmp_path: Path, make: Any, engine: str
) -> None:
    network = make()
    text = f"kind: diffusers\n{BUCKETS}" + ("null_label: true\n" if make is not dit else "")
    folder = pretrained.write_folder(
        tmp_path / "model", text, unet=network, scheduler=pretrained.scheduler()
    )
    own, converted = both(folder, engine)
    asked = make_query(random_images((5, *own.info.shape)), from_sigma(SIGMA), [0, 1, -1, 1, 0])
    asked.guidance = np.array([1, 3.0, 1, 1, 2.0])
    assert error(converted.denoise(asked).pixels, own.denoise(asked).pixels) < BUDGET
    alone = converted.denoise(asked[1:2]).pixels
    assert error(alone, own.denoise(asked[1:2]).pixels) < BUDGET


@pytest.mark.parametrize("engine", LIBRARIES)
@pytest.mark.slow
def test_conditions_of_any_length_are_answered_by_a_library(tmp_path: Path, engine: str) -> None:
    parts = {
        "unet": pretrained.conditional_unet(),
        "vae": pretrained.autoencoder(),
        "scheduler": pretrained.scheduler(),
    }
    folder = pretrained.write_folder(tmp_path / "model", f"kind: latent\n{BUCKETS}", **parts)
    own, converted = both(folder, engine)
    numbers = np.random.default_rng(0)

    def condition(rows: int) -> Condition:
        given, empty = numbers.standard_normal((2, rows, pretrained.WIDTH)).astype(np.float32)
        return Condition(given, empty, 2.0)

    conditions = [condition(rows) for rows in (1, 5, 5)]
    asked = make_query(
        random_images((3, *own.info.shape)), from_sigma(SIGMA[:3]), conditions=conditions
    )
    assert error(converted.denoise(asked).pixels, own.denoise(asked).pixels) < BUDGET


def test_a_folder_of_diffusers_names_its_own_engine_precision_and_buckets(tmp_path: Path) -> None:
    text = "kind: diffusers\nexecution: {engine: torch, precision: bfloat16}\n"
    parts = {"unet": pretrained.unet(), "scheduler": pretrained.scheduler()}
    folder = pretrained.write_folder(tmp_path / "model", text, **parts)
    info = ModelRepository(tmp_path, engines=EngineDefaults(engine="auto")).load("model").info
    assert (info.engine, info.precision, info.engine_reason) == ("torch", "bfloat16", "")
    assert 1e-4 < info.precision_error < 5e-2
    (folder / "model.yaml").write_text("kind: diffusers\nexecution: {buckets: [4, 2]}\n")
    with pytest.raises(LoadError, match=r"execution\.buckets: expected increasing numbers"):
        ModelRepository(tmp_path).load("model")
    (folder / "model.yaml").write_text("kind: diffusers\nexecution: {engine: tensorrt}\n")
    with pytest.raises(LoadError, match=r"execution\.engine"):
        ModelRepository(tmp_path).load("model")


def network(batch: str | int = "B", level: str | int = "B") -> Any:
    """A convolution with labels, a constant, a second output, and an input without a batch."""
    inputs = [
        value("x", (batch, *SHAPE)),
        value("sigma", (level,)),
        value("label", (batch,), TensorProto.INT64),
        value("shift", (1, 2, 1, 1)),
    ]
    kernel = random_images((2, 2, 3, 3)).numpy()
    nodes = [
        COLUMN,
        helper.make_node("Cast", ["label"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["number", "axes"], ["added"]),
        helper.make_node("Conv", ["x", "kernel"], ["smooth"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["smooth", "column"], ["product"]),
        helper.make_node("Add", ["product", "shift"], ["shifted"]),
        helper.make_node("Add", ["shifted", "added"], ["y"]),
    ]
    made = graph(nodes, inputs, [AXES, constant("kernel", kernel)], (batch, *SHAPE))
    made.graph.output.insert(0, value("smooth", (batch, *SHAPE)))
    return made


FIELDS = {"label": {"input": "label", "count": 5}, "constants": {"shift": [0.25, -0.5]}}


@pytest.mark.parametrize(
    ("batch", "level", "fields"),
    [("B", "B", {}), ("B", "B", {"deterministic": True}), (4, 4, {}), ("B", 1, {}), (1, 1, {})],
)
@pytest.mark.slow
def test_openvino_answers_as_onnxruntime(
    tmp_path: Path, batch: str | int, level: str | int, fields: dict[str, Any]
) -> None:
    own, converted = both(write(tmp_path, network(batch, level), **FIELDS, **fields))
    asked = make_query(random_images((5, *SHAPE)), from_sigma(SIGMA), [4, 0, 2, 1, 3])
    together = converted.denoise(asked).pixels
    assert error(together, own.denoise(asked).pixels) < BUDGET
    assert converted.info.batch_invariant == own.info.batch_invariant
    if own.info.batch_invariant:
        np.testing.assert_array_equal(together[3:4], converted.denoise(asked[3:4]).pixels)


def _random() -> Any:
    nodes = [
        COLUMN,
        helper.make_node("RandomNormalLike", ["x"], ["noise"], name="noise"),
        helper.make_node("Mul", ["noise", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["moved"]),
        helper.make_node("Mul", ["moved", "column"], ["y"]),
    ]
    return graph(nodes, initializers=[AXES, constant("zero", 0.0)])


def test_a_graph_with_noise_is_computed_by_onnxruntime_with_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, _random(), execution={"engine": "openvino"})
    info = ModelRepository(tmp_path).load("model").info
    assert info.engine == "onnxruntime"
    assert "expected no random numbers in the graph, got RandomUniform" in info.engine_reason
    assert [record.message for record in caplog.records] == ["engine replaced"]
    execution = {"engine": "openvino", "fallback": False}
    (tmp_path / "model" / "model.yaml").write_text(
        yaml.safe_dump(
            yaml.safe_load((tmp_path / "model" / "model.yaml").read_text())
            | {"execution": execution}
        )
    )
    with pytest.raises(LoadError, match="expected no random numbers in the graph"):
        ModelRepository(tmp_path).load("model")


def test_onnxruntime_has_the_precision_of_the_graph_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, network(), **FIELDS)
    defaults = EngineDefaults(engine="compile", precision="bfloat16")
    info = ModelRepository(tmp_path, engines=defaults).load("model").info
    assert (info.engine, info.precision) == ("onnxruntime", "float32")
    assert info.engine_reason.startswith("precision: expected float32 for onnxruntime")


@pytest.mark.parametrize("batch", ["B", 4])
@pytest.mark.slow
def test_auto_times_a_graph_in_both_engines(tmp_path: Path, batch: str | int) -> None:
    execution = {"engine": "auto", "threads": 1}
    write(tmp_path, network(batch, batch), **FIELDS, execution=execution)
    info = ModelRepository(tmp_path).load("model").info
    assert set(info.engine.split("+")) <= set(LIBRARIES)
    assert "onnxruntime takes" in info.engine_reason
    assert "openvino takes" in info.engine_reason
