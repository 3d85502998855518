"""Which engine computes a network: named, replaced, or the fastest; and batches in launches."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.examples import examples

from els_service.denoisers.engines.buckets import launches
from els_service.denoisers.engines.choice import Engine, choose
from els_service.denoisers.engines.exported import check_precision
from els_service.denoisers.engines.modules import Function, choose_engine
from els_service.denoisers.engines.options import EngineError, EngineOptions, PrecisionError
from els_service.denoisers.engines.probe import Probe, Runner

SECONDS = {
    "torch": {1: 4e-3, 4: 12e-3, 16: 40e-3},
    "openvino": {1: 2e-3, 4: 8e-3, 16: 30e-3},
    "onnxruntime": {1: 1e-3, 4: 7.9e-3, 16: 60e-3},
}


FACTORS = {"torch": 1, "openvino": 2, "onnxruntime": 3}
"""Engine → its answer to one."""


class Clock(Probe):
    """Probe that has measured already."""

    def seconds(self, run: Runner, batch: int) -> float:
        return SECONDS[run.__name__][batch]


def engine(name: str, precision: str) -> Engine:
    def run(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return x * FACTORS[name]

    run.__name__ = name
    return Engine(name, run, precision, f"{name} {precision}")


def own(precision: str) -> Engine:
    return engine("torch", precision)


def openvino(precision: str) -> Engine:
    if precision != "float32":
        raise PrecisionError("precision: expected float32 on this processor, got bfloat16")
    return engine("openvino", precision)


def onnxruntime(precision: str) -> Engine:
    check_precision(precision)
    return engine("onnxruntime", precision)


def missing(precision: str) -> Engine:
    raise EngineError("openvino: expected an installation, got none")


def choice(
    options: EngineOptions,
    build: Callable[[str], Engine] = openvino,
    third: Callable[[str], Engine] = missing,
) -> Engine:
    builders = {"torch": own, "openvino": build, "onnxruntime": third, "compile": missing}
    probe = Clock([np.zeros(1)], np.zeros(1, np.float32))
    return choose(options, builders, lambda: probe, "model")


def test_what_is_asked_for_and_there_is_chosen_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("torch", "openvino"):
        chosen = choice(EngineOptions(engine=name))
        assert (chosen.name, chosen.precision, chosen.reason) == (name, "float32", "")
    assert not caplog.records


def test_an_engine_that_is_missing_is_replaced_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chosen = choice(EngineOptions(engine="openvino"), missing)
    assert chosen.name == "torch"
    assert chosen.reason == "openvino: expected an installation, got none"
    (record,) = caplog.records
    assert (record.levelno, record.message) == (logging.WARNING, "engine replaced")
    said = {name: vars(record)[name] for name in ("source", "engine", "reason")}
    assert said == {"source": "model", "engine": "torch", "reason": chosen.reason}


def test_a_precision_that_is_missing_is_replaced_by_float32_of_the_same_engine() -> None:
    chosen = choice(EngineOptions(engine="openvino", precision="bfloat16"))
    assert (chosen.name, chosen.precision) == ("openvino", "float32")
    assert chosen.reason == "precision: expected float32 on this processor, got bfloat16"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_fallback_what_is_missing_is_refused_by_name(precision: str) -> None:
    options = EngineOptions(engine="openvino", precision=precision, fallback=False)
    build, name = (missing, "openvino: ") if precision == "float32" else (openvino, "precision: ")
    with pytest.raises(EngineError, match=f"^{name}expected"):
        choice(options, build)


def test_an_engine_that_this_kind_does_not_have_is_refused_by_name() -> None:
    options = EngineOptions(engine="tensorrt", fallback=False)
    with pytest.raises(EngineError, match="engine: expected one of torch, openvino, onnxruntime, "):
        choice(options)


def test_auto_takes_the_fastest_and_says_what_it_measured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    chosen = choice(EngineOptions(engine="auto"))
    assert chosen.name == "openvino"
    assert chosen.reason == (
        "torch takes 4 ms at batch 1 and 3 ms at batch 4 and 2.5 ms at batch 16 an image; "
        "openvino takes 2 ms at batch 1 and 2 ms at batch 4 and 1.88 ms at batch 16 an image; "
        "openvino: expected an installation, got none; "
        "compile is not measured, as it takes long to compile"
    )
    assert [record.message for record in caplog.records] == ["engine chosen"]


def test_auto_divides_batch_sizes_between_engines_that_differ_clearly() -> None:
    both = choice(EngineOptions(engine="auto"), third=onnxruntime)
    assert both.name == "onnxruntime+openvino"
    assert both.description == "onnxruntime float32; openvino float32"
    assert both.reason.endswith("onnxruntime from batch 1, openvino from batch 16")
    for count, answer in ((1, 3), (15, 3), (16, 2), (64, 2)):
        np.testing.assert_array_equal(both.run(np.ones(count, np.float32)), np.full(count, answer))


def test_auto_mixes_no_precisions() -> None:
    options = EngineOptions(engine="auto", precision="bfloat16")
    chosen = choice(options, missing, onnxruntime)
    assert (chosen.name, chosen.precision) == ("onnxruntime", "float32")
    assert chosen.run(np.ones(16, np.float32))[0] == FACTORS["onnxruntime"]


def test_auto_compares_the_batches_that_a_graph_takes() -> None:
    builders = {"torch": own, "openvino": openvino}
    probe = Clock([np.zeros(1)], np.zeros(1, np.float32))
    chosen = choose(EngineOptions(engine="auto"), builders, lambda: probe, "model", (4,))
    assert chosen.reason == (
        "torch takes 3 ms at batch 4 an image; openvino takes 2 ms at batch 4 an image"
    )


def test_auto_takes_what_there_is_and_says_what_is_not() -> None:
    chosen = choice(EngineOptions(engine="auto"), missing)
    assert chosen.name == "torch"
    assert "expected an installation" in chosen.reason


def test_auto_does_not_measure_where_bits_are_promised() -> None:
    chosen = choice(EngineOptions(engine="auto", deterministic=True))
    assert chosen.name == "torch"
    assert "a measured choice may be another at the next load" in chosen.reason


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_engines_of_a_cpu_are_refused_on_a_gpu_before_anything_is_placed_there(name: str) -> None:
    function = Function(torch.nn.Identity(), ("x",), ("x",), lambda images: [])
    options = EngineOptions(engine=name, fallback=False)
    with pytest.raises(EngineError, match=f"expected torch or compile on a GPU, got {name}"):
        choose_engine(function, torch.device("cuda"), options, "model")


SIZES = st.dictionaries(st.sampled_from([1, 2, 3, 5, 8]), st.floats(0.1, 9), min_size=1)


@given(count=st.integers(1, 9), seconds=SIZES)
@examples(40)
def test_launches_hold_all_images_in_the_least_time(count: int, seconds: dict[int, float]) -> None:
    chosen = launches(count, seconds)
    assert sum(chosen) >= count
    every = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(seconds, n) for n in range(1, count + 1)
    )
    least = min(sum(map(seconds.__getitem__, sizes)) for sizes in every if sum(sizes) >= count)
    assert sum(map(seconds.__getitem__, chosen)) == pytest.approx(least)


def test_a_probe_finds_exchanged_rows_and_kept_inputs() -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2) + 1
    probe, kept = Probe([x], 2 * x), []

    def keeping(given: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        kept.append(given)
        return 2 * kept[0][: len(given)] + (len(kept) > 1)

    assert probe.error(lambda given: 2 * given, 7) == 0
    assert probe.error(lambda given: 2 * given[::-1], 7) > 0.1
    assert probe.error(keeping, 7) > 0.1
    assert probe.error(lambda given: given * np.nan, 3) == np.inf
    with pytest.raises(ValueError, match=r"expected answers \[3, 2\], got \[2, 2\]"):
        probe.error(lambda given: given[:2], 3)
