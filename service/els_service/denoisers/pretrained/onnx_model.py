"""Denoiser of an ONNX graph that maps a noisy image and its level to D(x), ε or v.

Inputs are identified by name; one that is neither the image, the level nor the label is a constant.
The graph runs on the CPU in onnxruntime's own operators, with the number of torch's threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from els_kernels import checkpoint
from els_service.denoisers.base import Denoised, DenoiserInfo, Query, check_query, make_query
from els_service.denoisers.levels import Floats, NoiseLevel, cosine_time
from els_service.denoisers.networks.parametrisation import parametrise
from els_service.denoisers.pretrained.folder import Inside
from els_service.denoisers.pretrained.onnx_file import read_onnx
from els_service.errors import ElsError, InvalidArgumentError, LoadError

_LEVEL_INPUTS: dict[str, Callable[[Floats], Floats]] = {
    "sigma": lambda sigma: sigma,
    "log_sigma": np.log,
    "alpha_bar": lambda sigma: 1 / (1 + sigma**2),
    "time": cosine_time,
}
"""σ = s/a → value of the graph's level input; ``time`` is that of the cosine schedule."""
LEVELS = tuple(_LEVEL_INPUTS)
_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
}
_LARGEST_BATCH = 16
"""Maximum images of a launch; a larger one is not faster and needs more memory."""


@dataclass(frozen=True, kw_only=True)
class OnnxDocument:
    """Description of a graph in ``model.yaml``."""

    input: str
    """Name of the input for the noisy image: [B, C, H, W]."""
    output: str
    """Name of the output: [B, C, H, W]."""
    level: str
    """Name of the input for the noise level: [B], or with additional axes of size 1."""
    level_as: str = "sigma"
    """One of ``LEVELS``."""
    prediction: str = "x0"
    """Meaning of the output: ``x0`` for D(x), ``eps`` or ``v``."""
    exploding: bool = True
    """Whether the input image is x0 + σ·ε; otherwise a² + s² = 1."""
    sigma_range: tuple[float, float] = (0.002, 80.0)
    """Lowest and highest trained s/a."""
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
class _Input:
    """An input of a graph: its type, and its shape without the batch."""

    name: str
    dtype: np.dtype[Any]
    rest: tuple[int, ...]

    def fill(self, values: npt.ArrayLike, count: int) -> npt.NDArray[Any]:
        """Return values, [B] or of one image, in the input's type and shape."""
        array = np.asarray(values, self.dtype)
        return np.ascontiguousarray(np.broadcast_to(array, (count, *self.rest)))


class OnnxDenoiser:
    """A graph in onnxruntime.

    Args:
        session: session of the graph.
        document: its description.
        path: path of the graph, for errors.

    Raises:
        LoadError: Inputs, outputs or shapes differ from the document, or the graph fails or returns
            NaN or infinity; names the input or output.
    """

    def __init__(self, session: Any, document: OnnxDocument, path: Path) -> None:
        self._session, self._document = session, document
        self._graph = _Graph(session, document, path)
        self._largest = self._graph.batch or _LARGEST_BATCH
        if document.deterministic and self._largest > 1:
            if self._graph.batch:
                raise LoadError(path, f"deterministic: the graph takes {self._largest} at a time")
            self._largest = 1
        self._info = DenoiserInfo(
            kind="onnx",
            shape=self._graph.shape,
            trained_sigma=document.sigma_range,
            label_count=document.label_count,
            batch_invariant=self._largest == 1,
            implementation=f"onnxruntime {session.get_providers()[0]}",
            memory_bytes=path.stat().st_size,
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
        parts = [self._denoise_part(query[images]) for images in self._launches(len(query))]
        return Denoised(parts[0] if len(parts) == 1 else np.concatenate(parts), None)

    def _launches(self, images: int) -> Iterator[slice]:
        return (slice(first, first + self._largest) for first in range(0, images, self._largest))

    def _denoise_part(self, query: Query) -> npt.NDArray[np.float32]:
        checkpoint()
        document = self._document
        lowest, highest = document.sigma_range
        level = parametrise(document.prediction, query.level, max_sigma=highest)
        c_in = level.c_in * np.sqrt(1 + level.sigma**2) if document.exploding else level.c_in
        level_input = _LEVEL_INPUTS[document.level_as](np.maximum(level.sigma, lowest))
        x = query.pixels
        output = self._graph.run(x * _column(c_in), level_input, query.labels)
        mean: npt.NDArray[np.float32] = output * _column(level.c_out) + x * _column(level.c_skip)
        if not np.isfinite(mean).all():
            raise ElsError(f"{document.output}: the graph returned NaN or infinity")
        return mean

    def _try(self, path: Path) -> float:
        """Return the seconds of one image, or of one fixed batch, after a warm-up run."""
        seconds = 0.0
        try:
            for sigma in (1.0, self._document.sigma_range[1]):
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


class _Graph:
    """A session with its inputs classified."""

    def __init__(self, session: Any, document: OnnxDocument, path: Path) -> None:
        self._session, self._document, self._path = session, document, path
        nodes = {node.name: node for node in session.get_inputs()}
        self._check_names(nodes, {node.name for node in session.get_outputs()})
        noisy = nodes[document.input]
        if len(noisy.shape) != 4:
            raise self._fault(document.input, "[B, C, H, W]", noisy.shape)
        first = noisy.shape[0]
        self.batch: int | None = first if isinstance(first, int) else None
        self.shape = self._shape(noisy.shape[1:])
        self._noisy = self._input(noisy, self.shape)
        self._level = self._per_image(nodes[document.level])
        self._label = self._per_image(nodes[document.label]) if document.label else None
        self._constants = [
            (self._input(nodes[name]), self._constant(nodes[name], value))
            for name, value in document.constants.items()
        ]

    def run(
        self, x: npt.NDArray[np.float32], level_input: Floats, labels: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return the output for x [B, C, H, W], float32; a fixed batch is padded with the last x.

        Raises:
            ElsError: The output's shape differs from that of x.
        """
        count = len(x)
        size = self.batch or count
        rows = np.minimum(np.arange(size), count - 1)
        inputs = {
            self._noisy.name: self._noisy.fill(x[rows], size),
            self._level.name: self._level.fill(_axes(level_input[rows], self._level), size),
            **{one.name: one.fill(value, size) for one, value in self._constants},
        }
        if self._label is not None:
            inputs[self._label.name] = self._label.fill(_axes(labels[rows], self._label), size)
        (output,) = self._session.run([self._document.output], inputs)
        if output.shape != (size, *self.shape):
            expected = [size, *self.shape]
            raise ElsError(
                f"{self._document.output}: expected shape {expected}, got {list(output.shape)}"
            )
        answer: npt.NDArray[np.float32] = output[:count].astype(np.float32)
        return answer

    def _check_names(self, nodes: Mapping[str, Any], outputs: set[str]) -> None:
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

    def _input(self, node: Any, rest: tuple[int, ...] | None = None) -> _Input:
        """Return an input; undefined axes other than the batch have size 1."""
        if node.type not in _TYPES:
            raise self._fault(node.name, f"one of {', '.join(_TYPES)}", node.type)
        if not node.shape:
            raise self._fault(node.name, "a value for each image, [B]", "one value for all")
        if isinstance(node.shape[0], int) and node.shape[0] != self.batch:
            raise self._fault(node.name, f"a batch as in {self._document.input}", node.shape)
        axes = tuple(dim if isinstance(dim, int) else 1 for dim in node.shape[1:])
        return _Input(node.name, _TYPES[node.type], axes if rest is None else rest)

    def _per_image(self, node: Any) -> _Input:
        one = self._input(node)
        if any(size != 1 for size in one.rest):
            raise self._fault(node.name, "[B], or with axes of size 1", node.shape)
        return one

    def _constant(self, node: Any, value: float | list[float]) -> npt.NDArray[Any]:
        one = self._input(node)
        array = np.asarray(value, one.dtype)
        if array.ndim and array.size != np.prod(one.rest, dtype=int):
            raise self._fault(f"constants.{node.name}", f"values for {list(one.rest)}", array.size)
        return array.reshape(one.rest) if array.ndim else array

    def _fault(self, name: str, expected: str, got: object) -> LoadError:
        return LoadError(self._path, f"{name}: expected {expected}, got {got!s:.200}")


def load_onnx(document: OnnxDocument, file: str, inside: Inside) -> OnnxDenoiser:
    """Return the denoiser of an ONNX file.

    Args:
        document: description of the graph.
        file: its name.
        inside: resolver of names in the model folder.

    Raises:
        LoadError: The file is rejected, or differs from the document; names the field.
    """
    import onnxruntime

    path = inside(file)
    model = read_onnx(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    # Without spinning threads, which would take the cores from other models.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime's exceptions have no common class.
        text = " ".join(str(error).split())
        raise LoadError(path, f"onnxruntime rejects it: {text:.300}") from error
    return OnnxDenoiser(session, document, path)


def _axes(values: npt.NDArray[Any], one: _Input) -> npt.NDArray[Any]:
    return values.reshape(-1, *one.rest)


def _column(values: Floats) -> npt.NDArray[np.float32]:
    return values.astype(np.float32).reshape(-1, 1, 1, 1)
