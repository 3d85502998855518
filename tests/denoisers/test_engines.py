"""Engines of networks: the same answers, within budgets of float64, whatever a library does."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.support.denoisers import random_images
from tests.support.networks import SHAPE, WIDTHS, config, denoiser, write_folder
from torch import Tensor

from els_client._model_codec import decode_model
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits, Settings
from els_service.denoisers.base import DenoiserInfo, Query, concatenate, make_query
from els_service.denoisers.engines import exported, runtime
from els_service.denoisers.engines.converted import OpenvinoRunner
from els_service.denoisers.engines.exported import OnnxruntimeRunner
from els_service.denoisers.engines.options import EngineError
from els_service.denoisers.levels import cosine_time, from_sigma
from els_service.denoisers.networks import Network, NetworkConfig, NetworkDenoiser, build_network
from els_service.engine.loaded_model import Statistics
from els_service.engine.model_versions import ModelVersion
from els_service.errors import InvalidArgumentError, LoadError
from els_service.repository import ModelRepository
from els_service.server.requests.model_descriptions import encode_model
from els_service.server.requests.resume_token import _digest
from els_service.server.server import repository

pytestmark = pytest.mark.slow

BUDGETS = {"float32": 3e-6, "bfloat16": 3e-2}
"""Precision → largest relative error of D(x) against float64."""
SIGMA = [0.05, 20.0, 0.5, 3.0, 0.5, 1.0, 0.1]
LABELS = [-1, 0, 2, 2, -1, 1, 0]


def query(images: int = len(SIGMA)) -> Query:
    """Images that differ in level and label, so that exchanged rows are seen."""
    x = random_images((len(SIGMA), *SHAPE), 5)
    return make_query(x, from_sigma(np.array(SIGMA)), LABELS)[:images]


def in_float64(of: NetworkConfig, asked: Query) -> npt.NDArray[np.float64]:
    """D(x) of the weights of ``denoiser(of)``, in float64: (x - s·ε)/a at a² + s² = 1."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = build_network(of).double()
        sigma = torch.from_numpy(asked.level.sigma).view(-1, 1, 1, 1)
        x = torch.from_numpy(asked.pixels.astype(np.float64))
        time = torch.from_numpy(cosine_time(asked.level.sigma))
        rows = torch.from_numpy(np.where(asked.labels < 0, of.label_count, asked.labels))
        noise = network(x / (1 + sigma**2).sqrt(), time, rows)
        answer: npt.NDArray[np.float64] = (x - sigma * noise).numpy()
    return answer


def error(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    """Relative error of the worst image."""
    flat, wanted = got.reshape(len(got), -1), want.reshape(len(want), -1)
    return float((np.linalg.norm(flat - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


def served(info: DenoiserInfo) -> ModelVersion:
    return ModelVersion("model", 1, info, None, Statistics(), "content")


LIBRARIES = ("openvino", "onnxruntime")


# Every operation of "unet" is one of "unet-attention".
CONVERTED = [
    pytest.param(pair, marks=pytest.mark.nightly if pair[1] == "unet" else (), id="-".join(pair))
    for pair in itertools.product(LIBRARIES, WIDTHS)
]


@pytest.fixture(scope="module", params=CONVERTED)
def converted(request: pytest.FixtureRequest) -> NetworkDenoiser:
    engine, architecture = request.param
    return denoiser(config(architecture), engine=engine, fallback=False)


@pytest.fixture(scope="module", params=LIBRARIES)
def fixed(request: pytest.FixtureRequest) -> NetworkDenoiser:
    options: Any = {"deterministic": True, "buckets": (4,), "threads": 2, "fallback": False}
    return denoiser(config("unet"), engine=request.param, **options)


def test_a_library_answers_within_budget_of_float64(converted: NetworkDenoiser) -> None:
    info, of = converted.info, converted._config
    assert (info.precision, info.engine_reason) == ("float32", "")
    assert info.implementation.startswith(f"{info.engine} ")
    assert 0 < info.precision_error < BUDGETS["float32"]
    want = in_float64(of, query())
    assert error(denoiser(of).denoise(query()).pixels, want) < BUDGETS["float32"]
    assert error(converted.denoise(query()).pixels, want) < BUDGETS["float32"]


def test_rows_of_a_batch_are_never_mixed(converted: NetworkDenoiser) -> None:
    rows = [query()[i : i + 1] for i in range(len(SIGMA))]
    alone = [converted.denoise(row).pixels for row in rows]
    numbers = np.random.default_rng(0)
    for count in (2, 3, 5, 7, 19):
        chosen = numbers.integers(0, len(rows), count)
        together = converted.denoise(concatenate([rows[i] for i in chosen])).pixels
        assert error(together, np.concatenate([alone[i] for i in chosen])) < BUDGETS["float32"]


def test_threads_that_call_at_once_get_their_own_answers(fixed: NetworkDenoiser) -> None:
    rows = [query()[i : i + 1] for i in range(len(SIGMA))] * 8
    want = [fixed.denoise(row).pixels for row in rows]
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda row: fixed.denoise(row).pixels, rows))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_arrays_of_a_caller_stay_the_caller_s(fixed: NetworkDenoiser) -> None:
    asked = query(1)
    pixels = asked.pixels.copy()
    first = fixed.denoise(asked).pixels
    kept = first.copy()
    fixed.denoise(query()[1:2])
    np.testing.assert_array_equal(asked.pixels, pixels)
    np.testing.assert_array_equal(first, kept)
    asked.pixels[:] = 0
    np.testing.assert_array_equal(fixed.denoise(query(1)).pixels, kept)
    read_only = query(1)
    read_only.pixels.flags.writeable = False
    np.testing.assert_array_equal(fixed.denoise(read_only).pixels, kept)


def test_a_deterministic_network_keeps_its_bits_in_any_company(fixed: NetworkDenoiser) -> None:
    assert fixed.info.batch_invariant
    rows = [query()[i : i + 1] for i in range(len(SIGMA))]
    alone = [fixed.denoise(row).pixels for row in rows]
    for order in ([6, 0, 3], [1, 1, 5, 2, 0, 4, 6, 3, 2]):
        together = fixed.denoise(concatenate([rows[i] for i in order])).pixels
        np.testing.assert_array_equal(together, np.concatenate([alone[i] for i in order]))


def test_a_promise_of_bits_names_threads_and_so_does_a_resume_token(
    fixed: NetworkDenoiser,
) -> None:
    info = fixed.info
    assert "float32, threads 2" in info.implementation
    assert info.engine != "openvino" or info.implementation.endswith(", hint latency")
    threads = info.implementation.replace("threads 2", "threads 3")
    other = dataclasses.replace(info, implementation=threads)
    request = pb.SampleRequest(model="model", count=1)
    assert _digest(request, served(info)) != _digest(request, served(other))
    loose = [dataclasses.replace(one, batch_invariant=False) for one in (info, other)]
    assert len({_digest(request, served(one)) for one in loose}) == 1


@pytest.mark.parametrize("runner", [OpenvinoRunner, OnnxruntimeRunner])
def test_a_promise_that_a_library_does_not_keep_is_refused_by_name(
    runner: type[OpenvinoRunner | OnnxruntimeRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = runner.__call__

    def placed(self: Any, *inputs: Any) -> Any:
        rows = np.arange(len(inputs[0]), dtype=np.float32).reshape(-1, 1, 1, 1)
        return call(self, *inputs) * (1 + 1e-6 * rows)

    monkeypatch.setattr(runner, "__call__", placed)
    engine = runner.__name__.removesuffix("Runner").lower()
    with pytest.raises(ValueError, match=f"deterministic: expected the same bits .* {engine} "):
        denoiser(config(), engine=engine, deterministic=True, fallback=False)


def test_auto_with_determinism_is_torch_as_a_measurement_is_none() -> None:
    info = denoiser(config(), engine="auto", deterministic=True).info
    assert info.engine == "torch"
    assert "deterministic" in info.engine_reason


def test_auto_measures_its_engines_and_says_so() -> None:
    model = denoiser(config(), engine="auto")
    assert set(model.info.engine.split("+")) <= {"torch", *LIBRARIES}
    for engine in ("torch", *LIBRARIES):
        assert f"{engine} takes" in model.info.engine_reason
    assert "compile is not measured" in model.info.engine_reason
    want = in_float64(model._config, query())
    assert error(model.denoise(query()).pixels, want) < BUDGETS["float32"]


def test_bfloat16_is_computed_or_replaced_with_a_word_or_refused() -> None:
    """As the processor has it, or not."""
    of = config(prediction="x0")
    info = denoiser(of, engine="openvino", precision="bfloat16", buckets=(4,)).info
    if "BF16" in runtime._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert info.precision == "bfloat16"
        assert 1e-6 < info.precision_error < BUDGETS["bfloat16"]
        return
    assert (info.engine, info.precision) == ("openvino", "float32")
    assert info.engine_reason.startswith("precision: expected one of float32 for openvino on this")
    with pytest.raises(EngineError, match="on this processor, got bfloat16"):
        denoiser(of, engine="openvino", precision="bfloat16", fallback=False)


def test_onnxruntime_has_float32_alone_and_says_so() -> None:
    info = denoiser(config(), engine="onnxruntime", precision="bfloat16", buckets=(2,)).info
    assert (info.engine, info.precision) == ("onnxruntime", "float32")
    assert info.engine_reason == "precision: expected float32 for onnxruntime, got bfloat16"
    with pytest.raises(EngineError, match="precision: expected float32 for onnxruntime"):
        denoiser(config(), engine="onnxruntime", precision="bfloat16", fallback=False)


def test_torch_states_the_measured_error_of_bfloat16() -> None:
    of = config(prediction="x0")
    info = denoiser(of, precision="bfloat16").info
    assert info.precision == "bfloat16"
    assert 1e-4 < info.precision_error < BUDGETS["bfloat16"]
    assert denoiser(of).info.precision_error == 0


@pytest.mark.parametrize("engine", LIBRARIES)
def test_a_network_that_cannot_be_converted_is_served_by_torch_with_a_reason(
    engine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = Network.forward

    def unknown(self: Any, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        return forward(self, torch.special.bessel_j0(x), time, labels)

    monkeypatch.setattr(Network, "forward", unknown)
    model = denoiser(config(), engine=engine)
    assert model.info.engine == "torch"
    assert model.info.engine_reason.startswith(engine)
    assert "bessel" in model.info.engine_reason
    assert [record.message for record in caplog.records] == ["engine replaced"]
    np.testing.assert_array_equal(
        model.denoise(query()).pixels, denoiser(config()).denoise(query()).pixels
    )
    with pytest.raises(EngineError, match="bessel"):
        denoiser(config(), engine=engine, fallback=False)


@pytest.mark.parametrize("engine", LIBRARIES)
def test_a_conversion_that_answers_otherwise_than_the_network_is_found_at_load(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tracing fixes a branch that depends on values to that of its example."""
    forward = Network.forward

    def scaled(self: Any, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        is_positive = not x.is_meta and bool(x.sum() > 0)
        return forward(self, x, time, labels) * (2.0 if is_positive else 1.0)

    monkeypatch.setattr(Network, "forward", scaled)
    with pytest.raises(EngineError, match=f"{engine}: expected known answers within"):
        denoiser(config(), engine=engine, fallback=False)


def test_a_graph_of_one_batch_size_is_found_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tracing fixes a size that a module computes with."""
    forward = Network.forward

    def reshaped(self: Any, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        y = forward(self, x, time, labels)
        return y + torch.zeros(len(y.tolist()), 1, 1, 1, device=y.device) if not y.is_meta else y

    monkeypatch.setattr(Network, "forward", reshaped)
    with pytest.raises(EngineError, match="onnxruntime: batches of 1 fail: "):
        denoiser(config(), engine="onnxruntime", fallback=False)


@pytest.mark.parametrize("engine", LIBRARIES)
def test_a_network_without_labels_is_converted_although_it_does_not_use_them(engine: str) -> None:
    of = config(label_count=0)
    asked = make_query(random_images((3, *SHAPE)), from_sigma(np.array([0.1, 1.0, 9.0])))
    model = denoiser(of, engine=engine)
    assert model.info.engine == engine
    assert error(model.denoise(asked).pixels, in_float64(of, asked)) < BUDGETS["float32"]


@pytest.mark.parametrize("engine", LIBRARIES)
def test_a_conversion_leaves_the_log_of_the_process_alone(
    engine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward, levels = Network.forward, []

    def logging_(self: Any, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        levels.append(logging.getLogger().level)
        logging.getLogger("els").warning("another request")
        return forward(self, x, time, labels)

    monkeypatch.setattr(Network, "forward", logging_)
    before = logging.getLogger().level
    assert denoiser(config(), engine=engine, buckets=(2,)).info.engine == engine
    assert set(levels) == {before}
    assert len([one for one in caplog.records if one.name == "els"]) == len(levels)


def test_openvino_reports_nothing_to_its_vendor() -> None:
    openvino = runtime.load_openvino()
    assert cast(dict[str, Any], sys.modules)["openvino_telemetry"] is None
    reporter = openvino.tools.ovc.telemetry
    assert type(reporter).__module__ == "openvino.tools.ovc.telemetry_stub"


@pytest.mark.parametrize(
    ("engine", "load", "extra"),
    [
        ("openvino", runtime.load_openvino, "openvino"),
        ("onnxruntime", exported.load_onnxruntime, "onnx"),
    ],
)
def test_without_the_package_the_extra_is_named(
    engine: str, load: Any, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load.cache_clear()
    monkeypatch.setitem(cast(dict[str, Any], sys.modules), engine, None)
    try:
        info = denoiser(config(), engine=engine).info
        assert info.engine == "torch"
        expected = f"{engine}: expected an installation with the extra {extra}, got "
        assert info.engine_reason.startswith(expected)
        with pytest.raises(EngineError, match=expected):
            denoiser(config(), engine=engine, fallback=False)
    finally:
        load.cache_clear()


def test_gradients_are_those_of_the_network_whatever_computes_it(fixed: NetworkDenoiser) -> None:
    cotangent = random_images((2, *SHAPE), 3).numpy()
    got, want = fixed.vjp(query(2), cotangent), denoiser(config("unet")).vjp(query(2), cotangent)
    assert error(got.product, want.product) < 1e-5


def test_a_client_sees_engine_precision_reason_and_error(converted: NetworkDenoiser) -> None:
    info = dataclasses.replace(converted.info, engine_reason="as it is" * 500)
    model = decode_model(encode_model(served(info), Limits(1, 1, 1, 1)))
    assert (model.engine, model.precision) == (info.engine, "float32")
    assert model.precision_error == info.precision_error
    assert model.engine_reason.startswith("as it is")
    assert len(model.engine_reason) == 1000


def test_the_server_s_engine_holds_where_a_model_names_none(tmp_path: Path) -> None:
    write_folder(tmp_path / "plain", config(), buckets=(2,))
    write_folder(tmp_path / "own", config(), buckets=(2,))
    with (tmp_path / "own" / "model.yaml").open("a") as file:
        file.write("execution: {engine: torch, fallback: false}\n")
    models = repository(Settings(models=tmp_path, engine="openvino"))
    assert models.load("plain").info.engine == "openvino"
    assert models.load("own").info.engine == "torch"
    assert ModelRepository(tmp_path).load("plain").info.engine == "torch"
    strict = Settings(
        models=tmp_path, engine="openvino", engine_precision="bfloat16", engine_fallback=False
    )
    if "BF16" not in runtime._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(LoadError, match="precision: expected one of float32 for openvino"):
            repository(strict).load("plain")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("execution: fast", "execution: expected a mapping, got 'fast'"),
        ("execution: {motor: torch}", "execution.motor: expected one of buckets, channels_last"),
        ("execution: {engine: tensorrt}", "engine: expected one of torch, openvino, onnxruntime, "),
        ("execution: {threads: 0}", "threads: expected 1 to 1024, got 0"),
        ("execution: {fallback: 1}", "fallback: expected true or false, got 1"),
        ("execution: {buckets: [2]}", "buckets: expected once, got it in execution too"),
        ("compile: default\nengine: auto", "compile: expected none beside engine auto"),
    ],
)
def test_a_wrong_option_of_an_engine_is_refused_by_name(
    tmp_path: Path, text: str, fault: str
) -> None:
    folder = write_folder(tmp_path / "model", config(), buckets=(4,))
    with (folder / "model.yaml").open("a") as file:
        file.write(f"{text}\n")
    with pytest.raises(LoadError) as caught:
        ModelRepository(tmp_path).load("model")
    assert fault in str(caught.value)


def test_compile_is_an_engine_by_either_name() -> None:
    with pytest.raises(InvalidArgumentError, match="compile: expected none beside engine openvino"):
        denoiser(config(), engine="openvino", compile="default")
