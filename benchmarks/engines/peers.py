"""A network in each library, called directly: x, levels and labels → D(x), as for the service.

What a careful user writes: options for one caller at a time, the given number of threads, float32,
and for compiled graphs exactly the batch that is timed. All networks predict ε.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from els_service.denoisers.engines.runtime import load_openvino
from els_service.denoisers.levels import NoiseLevel

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Peer = Callable[[Images, NoiseLevel, Labels], Images]
Inputs = tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True)
class Subject:
    """A network as its users have it."""

    plain: Callable[..., Tensor]
    """Eager code: x, time, labels → ε."""
    module: nn.Module
    """The same function as a module, for export."""
    inputs: Callable[[Images, NoiseLevel, Labels], Inputs]
    """Inputs of the module."""
    names: tuple[str, ...]
    """Of the module's inputs."""
    shape: tuple[int, int, int]


def plain(subject: Subject, batch: int, threads: int) -> Peer:
    """Return eager torch, in its default layout."""

    def network(*inputs: npt.NDArray[Any]) -> Images:
        with torch.inference_mode():
            noise: Images = subject.plain(*map(torch.from_numpy, inputs)).numpy()
        return noise

    return _peer(subject, network)


def compiled(subject: Subject, batch: int, threads: int) -> Peer:
    """Return torch.compile's module, for fixed shapes."""
    # Forms of other batches and threads count towards a limit, beyond which it computes eagerly.
    torch._dynamo.reset()
    form = torch.compile(subject.module, dynamic=False)

    def network(*inputs: npt.NDArray[Any]) -> Images:
        with torch.inference_mode():
            noise: Images = form(*map(torch.from_numpy, inputs)).numpy()
        return noise

    return _peer(subject, network)


def onnxruntime(subject: Subject, batch: int, threads: int) -> Peer:
    """Return onnxruntime with an export of torch's."""
    import onnxruntime as library

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder, "network.onnx")
        torch.onnx.export(
            subject.module,
            _example(subject, batch),
            path,
            dynamo=False,
            input_names=list(subject.names),
            output_names=["noise"],
        )
        content = path.read_bytes()
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    session = library.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    used = {node.name for node in session.get_inputs()}

    def network(*inputs: npt.NDArray[Any]) -> Images:
        given = dict(zip(subject.names, inputs, strict=True))
        noise: Images = session.run(["noise"], {name: given[name] for name in used})[0]
        return noise

    return _peer(subject, network)


def openvino(subject: Subject, batch: int, threads: int) -> Peer:
    """Return OpenVINO, converted and compiled for the batch."""
    library = load_openvino()
    example = _example(subject, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = library.convert_model(subject.module, example_input=example)
    names = [one.get_any_name() for one in graph.inputs]
    kept = [
        next(i for i, name in enumerate(subject.names) if name in one.get_names())
        for one in graph.inputs
    ]
    graph.reshape({name: list(example[i].shape) for name, i in zip(names, kept, strict=True)})
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = library.Core().compile_model(graph, "CPU", options).create_infer_request()

    def network(*inputs: npt.NDArray[Any]) -> Images:
        given = [inputs[i] for i in kept]
        noise: Images = request.infer(given, share_inputs=False)[0]
        return noise

    return _peer(subject, network)


PEERS: Mapping[str, Callable[[Subject, int, int], Peer]] = {
    "plain": plain,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
"""Library → what makes the peer for a batch size and a number of threads."""


def _example(subject: Subject, batch: int) -> tuple[Tensor, ...]:
    level = NoiseLevel(np.full(batch, 0.8), np.full(batch, 0.6))
    x = np.random.default_rng(0).standard_normal((batch, *subject.shape)).astype(np.float32)
    return tuple(map(torch.from_numpy, subject.inputs(x, level, np.zeros(batch, np.int64))))


def _peer(subject: Subject, network: Callable[..., Images]) -> Peer:
    def peer(x: Images, level: NoiseLevel, labels: Labels) -> Images:
        noise = network(*subject.inputs(x, level, labels))
        a, s = level.a.astype(np.float32), level.s.astype(np.float32)
        clean = (x - s.reshape(-1, 1, 1, 1) * noise) / a.reshape(-1, 1, 1, 1)
        return np.asarray(clean, np.float32)

    return peer
