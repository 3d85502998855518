"""ONNX graph with its inputs identified by name and filled in their own types.

No value is changed by an unsafe cast: whole numbers must stay whole, and real ones finite and
within one percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from els_service.denoisers.engines.converted import Inputs
from els_service.denoisers.engines.probe import Array, Runner
from els_service.denoisers.levels import Floats
from els_service.denoisers.pretrained.time_inputs import TimeInput
from els_service.errors import ElsError, LoadError

_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
}
_FLOATS = tuple(name for name, dtype in _TYPES.items() if dtype.kind == "f")
_CAST_ERROR = 0.01
"""Largest relative error of a real number in a narrower type: that of float16 is 0.0005."""


@dataclass(frozen=True, kw_only=True)
class OnnxDocument:
    """Description of a graph in ``model.yaml``."""

    input: str
    """Name of the input for the noisy image: [B, C, H, W]."""
    output: str
    """Name of the output: [B, C, H, W]."""
    level: str
    """Name of the input for the noise level: [B], or with further axes of size 1, or one for all
    images, [1] or a scalar."""
    level_as: str = "sigma"
    """One of ``LEVELS``, for a graph without ``time_input``."""
    time_input: TimeInput | None = None
    """The level as a timestep or a time of flow."""
    prediction: str = "x0"
    """Meaning of the output: ``x0`` for D(x), ``eps``, ``v`` or ``flow``."""
    scaling: str = "exploding"
    """One of ``SCALINGS``."""
    sigma_range: tuple[float, float] = (0.002, 80.0)
    """Lowest and highest trained s/a, without ``time_input``."""
    label: str | None = None
    """Name of the input for the label, [B]."""
    label_count: int = 0
    constants: Mapping[str, float | list[float]] = field(default_factory=dict)
    """Other inputs → one number, or all numbers of one image; the same for every image."""
    shape: tuple[int, int, int] | None = None
    """(C, H, W); required if the graph does not define it."""
    deterministic: bool = False
    """Whether images are computed one at a time, so that results do not depend on the batch."""


@dataclass(frozen=True)
class Input:
    """An input of a graph: its type, and its shape without the batch."""

    name: str
    dtype: np.dtype[Any]
    rest: tuple[int, ...]
    shared: bool = False
    """Whether it takes one value for all images."""
    is_scalar: bool = False
    """Whether that has no axis at all."""

    @property
    def is_whole(self) -> bool:
        """Whether it takes integers only."""
        return self.dtype.kind == "i"

    def fill(self, values: npt.ArrayLike, count: int) -> npt.NDArray[Any]:
        """Return values, [B] or of one image, in the input's type and shape."""
        array = np.asarray(values, self.dtype)
        if self.is_scalar:
            return array.reshape(-1)[:1].reshape(())
        size = 1 if self.shared else count
        per_image = array.ndim > len(self.rest)
        return np.ascontiguousarray(
            np.broadcast_to(array[:size] if per_image else array, (size, *self.rest))
        )

    def holds(self, values: npt.ArrayLike) -> bool:
        """Return whether the type holds values: integers exactly, others up to ``_CAST_ERROR``."""
        exact = np.asarray(values, np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            cast = exact.astype(self.dtype).astype(np.float64)
        error = 0.0 if self.is_whole else _CAST_ERROR
        return bool((np.abs(cast - exact) <= error * np.abs(exact)).all())


class Graph:
    """A graph with its inputs classified, and the engine that computes it.

    Args:
        session: of onnxruntime.
        document: description of the graph.
        path: path of the graph, for errors.

    Raises:
        LoadError: Inputs or outputs differ from the document, or cannot hold its values; names the
            input or output.
    """

    def __init__(self, session: Any, document: OnnxDocument, path: Path) -> None:
        self._session, self._document, self._path = session, document, path
        nodes = {node.name: node for node in session.get_inputs()}
        self._check_names(nodes, {node.name: node for node in session.get_outputs()})
        noisy = nodes[document.input]
        if len(noisy.shape) != 4:
            raise self._fault(document.input, "[B, C, H, W]", noisy.shape)
        first = noisy.shape[0]
        self.batch: int | None = first if isinstance(first, int) else None
        self.shape = self._shape(noisy.shape[1:])
        self._noisy = self._input(noisy, self.shape)
        if self._noisy.is_whole:
            raise self._fault(document.input, f"one of {', '.join(_FLOATS)}", noisy.type)
        self.level = self._one_number(nodes[document.level])
        self._label = self._label_input(nodes[document.label]) if document.label else None
        self._constants = [
            (self._input(nodes[name]), self._constant(nodes[name], value))
            for name, value in document.constants.items()
        ]
        given = [self._noisy, self.level, *(one for one, _ in self._constants)]
        given += [self._label] if self._label is not None else []
        self.inputs = Inputs(
            tuple(one.name for one in given),
            tuple(not one.shared for one in given),
            tuple(one.rest for one in given),
        )
        """Of the engine, in order."""
        self.engine: Runner = self.computed
        """Engine of the graph."""

    def computed(self, *inputs: Array) -> npt.NDArray[np.float32]:
        """Return the output by onnxruntime."""
        given = dict(zip(self.inputs.names, inputs, strict=True))
        (output,) = self._session.run([self._document.output], given)
        answer: npt.NDArray[np.float32] = output.astype(np.float32, copy=False)
        return answer

    def fill(
        self, x: npt.NDArray[np.float32], level_input: Floats, labels: npt.NDArray[np.int64]
    ) -> list[Array]:
        """Return the engine's inputs for x [B, C, H, W]; a fixed batch is padded with the last x.

        Args:
            x: in the scale of the graph.
            level_input: values of the level's input, [B].
            labels: [B].
        """
        count = len(x)
        size = self.batch or count
        rows = np.minimum(np.arange(size), count - 1)
        inputs = [
            self._noisy.fill(x[rows], size),
            self.level.fill(level_input[rows].reshape(-1, *self.level.rest), size),
            *(one.fill(value, size) for one, value in self._constants),
        ]
        if self._label is not None:
            inputs.append(self._label.fill(labels[rows].reshape(-1, *self._label.rest), size))
        return inputs

    def run(
        self, x: npt.NDArray[np.float32], level_input: Floats, labels: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return the output for x [B, C, H, W], float32; arguments as of ``fill``.

        Raises:
            ElsError: The output's shape differs from that of x.
        """
        count = len(x)
        output = self.engine(*self.fill(x, level_input, labels))
        expected = (self.batch or count, *self.shape)
        if output.shape != expected:
            raise ElsError(
                f"{self._document.output}: expected shape {list(expected)}, "
                f"got {list(output.shape)}"
            )
        return output[:count]

    def check_level(self, values: Floats, level_as: str) -> None:
        """Check that the level's input can hold the values at the ends of the trained range.

        Args:
            values: of the level's input.
            level_as: ``level.as`` of the document.

        Raises:
            LoadError: It is an integer that would round them, or too narrow a float.
        """
        name, dtype = self._document.level, self.level.dtype
        if self.level.is_whole and not (self._document.time_input and self.level.holds(values)):
            expected = f"a float for level.as {level_as} (integers are for level.as timestep)"
            raise self._fault(name, expected, dtype)
        if not self.level.holds(values):
            expected = f"a type that holds {level_as} from {values[0]:g} to {values[-1]:g}"
            raise self._fault(name, expected, dtype)

    def _check_names(self, nodes: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        document = self._document
        names = [document.input, document.level, *document.constants]
        names += [document.label] if document.label else []
        for name in names:
            if name not in nodes:
                raise self._fault("inputs", f"{name} among them", sorted(nodes))
        for name in nodes:
            if name not in names:
                raise self._fault(name, "a value in constants for this input", "none")
        if len(set(names)) < len(names):
            raise self._fault("inputs", "each input used once", names)
        if document.output not in outputs:
            raise self._fault("outputs", f"{document.output} among them", sorted(outputs))
        if outputs[document.output].type not in _FLOATS:
            got = outputs[document.output].type
            raise self._fault(document.output, f"one of {', '.join(_FLOATS)}", got)

    def _shape(self, dims: list[int | str | None]) -> tuple[int, int, int]:
        """Return (C, H, W) from the graph, or from the document if the graph does not define it."""
        given = self._document.shape
        if given is None:
            if not all(isinstance(dim, int) for dim in dims):
                raise self._fault("shape", "[C, H, W], as the graph does not define it", dims)
            channels, height, width = (int(dim) for dim in dims if dim)
            return channels, height, width
        for dim, own in zip(dims, given, strict=True):
            if isinstance(dim, int) and dim != own:
                raise self._fault("shape", f"{dims}, as in the graph", list(given))
        return given

    def _input(self, node: Any, rest: tuple[int, ...] | None = None) -> Input:
        """Return an input; undefined axes other than the batch have size 1."""
        if node.type not in _TYPES:
            raise self._fault(node.name, f"one of {', '.join(_TYPES)}", node.type)
        first = node.shape[0] if node.shape else 1
        shared = isinstance(first, int) and first == 1 != self.batch
        if isinstance(first, int) and not shared and first != self.batch:
            raise self._fault(node.name, f"a batch as in {self._document.input}", node.shape)
        axes = tuple(dim if isinstance(dim, int) else 1 for dim in node.shape[1:])
        return Input(
            node.name,
            _TYPES[node.type],
            axes if rest is None else rest,
            shared=shared or not node.shape,
            is_scalar=not node.shape,
        )

    def _one_number(self, node: Any) -> Input:
        one = self._input(node)
        if any(size != 1 for size in one.rest):
            raise self._fault(node.name, "[B], or with axes of size 1", node.shape)
        return one

    def _label_input(self, node: Any) -> Input:
        one = self._one_number(node)
        if one.shared:
            raise self._fault(node.name, "a value for each image, [B]", "one value for all")
        # If a float holds the last odd number, it holds all before.
        last = self._document.label_count - 1
        if not all(int(one.dtype.type(label)) == label for label in (last, max(last - 1, 0))):
            raise self._fault(node.name, f"a type that holds labels to {last}", one.dtype)
        return one

    def _constant(self, node: Any, value: float | list[float]) -> npt.NDArray[Any]:
        one = self._input(node)
        if not one.holds(value):
            expected = f"values that {one.dtype} holds"
            raise self._fault(f"constants.{node.name}", expected, value)
        array = np.asarray(value, one.dtype)
        if array.ndim and array.size != np.prod(one.rest, dtype=int):
            raise self._fault(f"constants.{node.name}", f"values for {list(one.rest)}", array.size)
        return array.reshape(one.rest) if array.ndim else array

    def _fault(self, name: str, expected: str, got: object) -> LoadError:
        return LoadError(self._path, f"{name}: expected {expected}, got {got!s:.200}")
