"""Denoiser of an ONNX graph that maps a noisy image and its level to D(x), ε, v or a velocity.

Inputs are identified by name; one that is neither the image, the level nor the label is a constant.
The graph runs on the CPU, in onnxruntime's own operators or converted to OpenVINO, with the number
of torch's threads unless the model names another.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from els_kernels import checkpoint
from els_service.denoisers.answers import check_finite
from els_service.denoisers.base import Denoised, DenoiserInfo, Query, make_query
from els_service.denoisers.engines.choice import COMPARED, Engine, choose
from els_service.denoisers.engines.converted import OpenvinoRunner, graph_of_onnx
from els_service.denoisers.engines.exported import (
    check_precision,
    description_of,
    session_of,
)
from els_service.denoisers.engines.options import EngineError, EngineOptions
from els_service.denoisers.engines.probe import Probe
from els_service.denoisers.engines.runtime import Settings
from els_service.denoisers.levels import (
    MAX_SIGMA,
    MIN_SIGMA,
    Floats,
    NoiseLevel,
    cosine_time,
)
from els_service.denoisers.networks.parametrisation import parametrise
from els_service.denoisers.pretrained.onnx_file import read_onnx
from els_service.denoisers.pretrained.onnx_graph import Graph, OnnxDocument
from els_service.denoisers.pretrained.time_inputs import FlowTime, TimeInput
from els_service.denoisers.pretrained.timesteps import Timesteps
from els_service.denoisers.query_checks import check_query
from els_service.errors import InvalidArgumentError, LoadError

_LEVEL_INPUTS: dict[str, Callable[[Floats], Floats]] = {
    "sigma": lambda sigma: sigma,
    "log_sigma": np.log,
    "alpha_bar": lambda sigma: 1 / (1 + sigma**2),
    "time": cosine_time,
}
"""σ = s/a → value of the graph's level input; ``time`` is that of the cosine schedule."""
LEVELS = tuple(_LEVEL_INPUTS)
_SCALINGS: dict[str, Callable[[Floats], Floats]] = {
    "exploding": lambda sigma: np.sqrt(1 + sigma**2),
    "preserving": np.ones_like,
    "flow": lambda sigma: np.sqrt(1 + sigma**2) / (1 + sigma),
}
"""σ → scale of the graph's image relative to the one with a² + s² = 1: the graph takes x0 + σ·ε,
a·x0 + s·ε, or (1-t)·x0 + t·ε with t = σ/(1+σ)."""
SCALINGS = tuple(_SCALINGS)
_LARGEST_BATCH = 16
"""Maximum images of a launch; a larger one is not faster and needs more memory."""
OWN = EngineOptions(engine="onnxruntime")
"""The engine that computes every graph."""
_PROBED = 3
"""Images of a probe."""


class OnnxDenoiser:
    """A graph in onnxruntime or OpenVINO.

    Args:
        session: session of the graph.
        document: its description.
        path: path of the graph, for errors.
        options: of the engine.
        model: the graph as ``read_onnx`` returns it, for other engines than onnxruntime.

    Raises:
        LoadError: Inputs, outputs or shapes differ from the document, or the graph fails or returns
            NaN or infinity; names the input or output.
        EngineError: The machine lacks the engine or precision, and there is no fallback.
    """

    def __init__(
        self,
        session: Any,
        document: OnnxDocument,
        path: Path,
        options: EngineOptions = OWN,
        model: bytes | Path = b"",
    ) -> None:
        self._session, self._document = session, document
        self._graph = Graph(session, document, path)
        self._time = self._time_input(path)
        self._max_sigma = self._time.max_sigma if self._time else document.sigma_range[1]
        self._least_sigma = self._time.min_sigma if self._time else document.sigma_range[0]
        self._check_level()
        self._largest = self._graph.batch or _LARGEST_BATCH
        if document.deterministic and self._largest > 1:
            if self._graph.batch:
                raise LoadError(path, f"deterministic: the graph takes {self._largest} at a time")
            self._largest = 1
        engine = choose(
            options,
            {
                OWN.engine: partial(self._own, options.thread_count),
                "openvino": partial(self._converted, options, model),
            },
            self._probe,
            path,
            COMPARED if self._largest == _LARGEST_BATCH else (self._largest,),
        )
        self._graph.engine = engine.run
        self._info = DenoiserInfo(
            kind="onnx",
            shape=self._graph.shape,
            schedule="timesteps" if self._time else "cosine",
            own_schedule=self._time.schedule if self._time else None,
            trained_sigma=(self._time.min_sigma, self._time.max_sigma)
            if self._time
            else document.sigma_range,
            label_count=document.label_count,
            batch_invariant=self._largest == 1,
            implementation=engine.description,
            engine=engine.name,
            engine_reason=engine.reason,
            precision=engine.precision,
            precision_error=engine.error,
            memory_bytes=path.stat().st_size + engine.memory_bytes,
        )
        self._seconds = self._try(path)

    @property
    def info(self) -> DenoiserInfo:
        """Description of the graph."""
        return self._info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if shape or a label is not supported."""
        check_query(self._info, query)
        if self._info.label_count and (query.labels < 0).any():
            expected = f"0 to {self._info.label_count - 1}: this graph requires a label"
            raise InvalidArgumentError("labels", expected, -1)

    def predict_seconds(self, query: Query) -> float:
        """Return the number of images times the duration measured when the model was loaded."""
        batch = self._graph.batch or 1
        return self._seconds * math.ceil(len(query) / batch)

    def denoise(self, query: Query) -> Denoised:
        """Return D(x), without evidence.

        Raises:
            ElsError: The graph returned NaN or infinity.
        """
        parts = [self._denoise_part(query[images]) for images in self._launches(query)]
        return Denoised(parts[0] if len(parts) == 1 else np.concatenate(parts), None)

    def _launches(self, query: Query) -> Iterator[slice]:
        """Yield slices of images for one launch each: of one level, where the graph takes one."""
        levels = query.level.sigma.tolist() if self._graph.level.shared else [0.0] * len(query)
        first = 0
        for _, group in itertools.groupby(levels):
            end = first + len(list(group))
            for start in range(first, end, self._largest):
                yield slice(start, min(start + self._largest, end))
            first = end

    def _denoise_part(self, query: Query) -> npt.NDArray[np.float32]:
        checkpoint()
        document = self._document
        level = parametrise(document.prediction, query.level, max_sigma=self._max_sigma)
        c_in = level.scale * _SCALINGS[document.scaling](level.sigma)
        x, level_input = query.pixels, self._level_input(level.sigma)
        # What overflows is found below, in the answer.
        with np.errstate(over="ignore", invalid="ignore"):
            output = self._graph.run(x * _column(c_in), level_input, query.labels)
            mean: npt.NDArray[np.float32] = output * _column(level.c_out)
            mean += x * _column(level.c_skip)
        check_finite(mean, f"{document.output}: the graph")
        return mean

    def _own(self, threads: int, precision: str) -> Engine:
        """Return onnxruntime, which computes in the types of the graph."""
        check_precision(precision)
        return Engine(OWN.engine, self._graph.computed, precision, description_of(threads))

    def _converted(self, options: EngineOptions, model: bytes | Path, precision: str) -> Engine:
        """Return the graph converted to OpenVINO."""
        settings = Settings(precision, options.thread_count)
        buckets = options.buckets
        if self._graph.batch or self._document.deterministic:
            buckets = (self._largest,)
        graph = graph_of_onnx(model, self._document.output)
        run = OpenvinoRunner(graph, self._graph.inputs, settings, self._probe(), buckets)
        held = len(run.seconds) * (len(model) if isinstance(model, bytes) else 0)
        return Engine("openvino", run, precision, run.description, run.error, memory_bytes=held)

    def _probe(self) -> Probe:
        """Return answers of onnxruntime at levels of the trained range."""
        graph, images = self._graph, self._graph.batch or _PROBED
        numbers = np.random.default_rng(0)
        x = numbers.standard_normal((images, *graph.shape)).astype(np.float32)
        sigma = np.geomspace(min(1.0, self._max_sigma), max(self._least_sigma, 1e-2), images)
        if graph.level.shared:
            sigma = np.full(images, sigma[0])
        labels = np.arange(images)[::-1] % max(self._document.label_count, 1)
        inputs = graph.fill(x, self._level_input(sigma), labels)
        return Probe(inputs, graph.computed(*inputs))

    def _time_input(self, path: Path) -> TimeInput | None:
        """Return the time input, rounded where the graph takes integers."""
        time_input = self._document.time_input
        if not self._graph.level.is_whole or not isinstance(time_input, Timesteps | FlowTime):
            return time_input
        if isinstance(time_input, FlowTime) and time_input.scale < 2:
            expected = "level.timesteps: expected more than 1, as the graph takes integers"
            raise LoadError(path, f"{self._document.level}: {expected}")
        return replace(time_input, whole=True)

    def _level_input(self, sigma: Floats) -> Floats:
        """Return the values of the level's input."""
        if self._time:
            return self._time.at(sigma)
        form = _LEVEL_INPUTS[self._document.level_as]
        return form(np.maximum(sigma, self._document.sigma_range[0]))

    def _check_level(self) -> None:
        lowest, highest = self._document.sigma_range
        ends = np.array([MIN_SIGMA, MAX_SIGMA] if self._time else [lowest, highest])
        self._graph.check_level(self._level_input(ends), self._document.level_as)

    def _try(self, path: Path) -> float:
        """Return the seconds of one image, or of one fixed batch, after a warm-up run."""
        seconds = 0.0
        try:
            for sigma in (1.0, self._max_sigma):
                level = NoiseLevel(np.ones(1), np.array([sigma]))
                query = make_query(torch.zeros(1, *self._graph.shape), level, 0)
                began = time.perf_counter()
                self._denoise_part(query)
                seconds = time.perf_counter() - began
        except Exception as error:
            # onnxruntime's exceptions have no common class.
            text = " ".join(str(error).split())
            raise LoadError(path, f"failed at its first run: {text:.300}") from error
        return seconds


def load_onnx(
    document: OnnxDocument,
    file: str,
    inside: Callable[[str], Path],
    engine: EngineOptions = OWN,
) -> OnnxDenoiser:
    """Return the denoiser of an ONNX file.

    Args:
        document: description of the graph.
        file: its name.
        inside: resolver of names in the model folder.
        engine: options of the engine.

    Raises:
        LoadError: The file is rejected, or differs from the document; names the field.
        EngineError: The machine lacks the engine or precision, and there is no fallback.
    """
    path = inside(file)
    model = read_onnx(path)
    try:
        session = session_of(model, engine.thread_count)
    except EngineError as error:
        raise LoadError(path, str(error)) from error
    return OnnxDenoiser(session, document, path, engine, model)


def _column(values: Floats) -> npt.NDArray[np.float32]:
    return values.astype(np.float32).reshape(-1, 1, 1, 1)
