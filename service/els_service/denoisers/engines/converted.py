"""Graphs converted to OpenVINO, and the runner that computes them in batches of fixed sizes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from els_kernels import checkpoint
from els_service.denoisers.engines.buckets import SIZES, launches, worth_trying
from els_service.denoisers.engines.options import EngineError
from els_service.denoisers.engines.probe import ERRORS, Array, Probe
from els_service.denoisers.engines.runtime import Compiled, Settings, load_openvino

_RANDOM = ("RandomUniform", "RandomPoisson", "Multinomial")
"""Operations whose numbers begin with the same ones at every load."""


def graph_of_module(module: nn.Module, example: Sequence[Tensor]) -> Any:
    """Return the graph of a torch module in evaluation mode, with an open batch axis.

    Its inputs have the names of the module's arguments. OpenVINO traces the module: what depends on
    values, not on shapes, would be fixed to those of the example, and is found by a probe.

    Args:
        module: takes and returns tensors [B, …].
        example: its inputs on the CPU, of at least two images, as axes of one may be fixed.

    Raises:
        EngineError: OpenVINO cannot convert it.
    """
    load_openvino()
    # The frontend itself: openvino.convert_model silences the log of the whole process meanwhile.
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # What depends on values is found by the probe; how OpenVINO traces is its own matter.
            warnings.simplefilter("ignore")
            decoder = TorchScriptPythonDecoder(module, example_input=tuple(example))
            return frontend.convert(frontend.load(decoder))
    except Exception as error:
        # torch and OpenVINO's frontends raise exceptions of many classes.
        text = " ".join(str(error).split())
        raise EngineError(f"openvino cannot convert the network: {text:.300}") from error


def graph_of_onnx(model: bytes | Path, output: str) -> Any:
    """Return the graph of an ONNX model with one of its outputs.

    Args:
        model: content of the file, or its path if it has external data.
        output: name of the output.

    Raises:
        EngineError: OpenVINO cannot convert it.
    """
    openvino = load_openvino()
    try:
        whole = openvino.Core().read_model(
            str(model) if isinstance(model, Path) else io.BytesIO(model)
        )
        kept = [one.get_node() for one in whole.outputs if output in one.get_names()]
        return openvino.Model(kept, whole.get_parameters())
    except Exception as error:
        # Of its frontend, of several classes.
        text = " ".join(str(error).split())
        raise EngineError(f"openvino cannot convert the graph: {text:.300}") from error


@dataclass(frozen=True)
class Inputs:
    """Inputs of a graph, in the order in which a runner is given them."""

    names: tuple[str, ...]
    batched: tuple[bool, ...]
    """Whether each has a row for each image; others have one value for all."""
    rest: tuple[tuple[int, ...], ...]
    """Further axes of each; -1 for one that differs between calls."""


class OpenvinoRunner:
    """A graph compiled for several batch sizes; see ``probe.Runner``.

    Args:
        graph: converted from the network.
        inputs: of the runner; those that the graph does not use are dropped.
        settings: of the compilation.
        probe: known answers, compared at each batch size.
        buckets: batch sizes; empty for ``buckets.SIZES``, of a slow network only the smaller ones.

    Raises:
        EngineError: The graph cannot be compiled, is random, or answers other than the probe.
    """

    def __init__(
        self,
        graph: Any,
        inputs: Inputs,
        settings: Settings,
        probe: Probe,
        buckets: Sequence[int] = (),
    ) -> None:
        settings.check()
        _check_not_random(graph)
        self.description = settings.description
        self._places = _places(graph, inputs)
        self._batched = [inputs.batched[place] for place in self._places]
        self._rest = [inputs.rest[place] for place in self._places]
        self._compiled: dict[int, Compiled] = {}
        self.seconds: dict[int, float] = {}
        """Batch size → seconds of a launch, measured at load."""
        self.error = 0.0
        """Largest relative error of an image of the probe."""
        for size in buckets or SIZES:
            if worth_trying(size, self.seconds, buckets):
                self._add(graph, size, settings, probe)
        self._plans: dict[int, list[int]] = {}

    @property
    def largest(self) -> int:
        """Largest batch size of a launch."""
        return max(self._compiled)

    def __call__(self, *inputs: Array) -> npt.NDArray[np.float32]:
        """Return F of inputs [B, …], any B."""
        given = [inputs[place] for place in self._places]
        rows = zip(given, self._batched, strict=True)
        count = max(len(one) for one, batched in rows if batched)
        if count in self._compiled:
            return self._compiled[count](given, count)
        parts, first = [], 0
        for size in self._plan(count):
            checkpoint()
            part = slice(first, first + size)
            rows = zip(given, self._batched, strict=True)
            taken = [one[part] if batched else one for one, batched in rows]
            parts.append(self._compiled[size](taken, size)[: count - first])
            first += size
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _plan(self, count: int) -> list[int]:
        if count not in self._plans:
            self._plans[count] = launches(count, self.seconds)
        return self._plans[count]

    def _add(self, graph: Any, size: int, settings: Settings, probe: Probe) -> None:
        """Compile for a batch size, compare with the probe, and measure."""
        sized, openvino = graph.clone(), load_openvino()
        # Axes that are left open are inferred at each call, which takes longer.
        shapes = {
            i: openvino.PartialShape([size, *self._rest[i]])
            for i, batched in enumerate(self._batched)
            if batched
        }
        try:
            sized.reshape(shapes)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise EngineError(f"openvino: batches of {size} do not fit: {text:.300}") from error
        self._compiled[size] = Compiled(sized, settings, self._batched)
        found, budget = probe.error(self, size), ERRORS[settings.precision]
        if not found <= budget:
            raise EngineError(
                f"openvino: expected known answers within {budget:g} in {settings.precision}, "
                f"got {found:.2g} in a batch of {size}"
            )
        self.error = max(self.error, found)
        self.seconds[size] = probe.seconds(self, size)


def _places(graph: Any, inputs: Inputs) -> list[int]:
    """Return the place of each of the graph's inputs among those of the runner."""
    places = []
    for one in graph.inputs:
        found = [place for place, name in enumerate(inputs.names) if name in one.get_names()]
        if len(found) != 1:
            expected = f"expected inputs {', '.join(inputs.names)}"
            raise EngineError(f"openvino: {expected}, got {sorted(one.get_names())}")
        places += found
    return places


def _check_not_random(graph: Any) -> None:
    for operation in graph.get_ops():
        if operation.get_type_name() in _RANDOM:
            raise EngineError(
                f"openvino: expected no random numbers in the graph, got "
                f"{operation.get_type_name()} in {operation.get_friendly_name()}, "
                "which repeats the same ones after every load"
            )
