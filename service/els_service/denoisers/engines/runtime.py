"""OpenVINO: the library, its settings, and a graph compiled for one batch size.

What one would not guess of release 2026.4, and what is done about it here:

- Importing the package reports the import to its vendor, from a forked process; a fork of a server
  with gRPC threads may hang. The reporter is made unimportable, for which the package has a stub.
- The default precision is that of the processor: bfloat16 where it has AMX. One that the processor
  lacks is computed in float32 without a word. The precision is always set, and checked.
- A compiled graph that is called has one request for all threads, which mix their answers. Each
  thread has a request of its own.
- A request may keep its first caller's array and write into it later. Inputs are copied into the
  request's memory, and answers out of it.
- The last bits of some operations depend on the number of threads and on the performance hint. Both
  are set, and are part of ``Settings.description``.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from els_service.denoisers.engines.options import EngineError, PrecisionError
from els_service.denoisers.engines.probe import Array

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
_HINT = "LATENCY"


@functools.cache
def load_openvino() -> Any:
    """Return the package.

    Raises:
        EngineError: It is not installed, or cannot be loaded.
    """
    # An import that fails: its reports are then off, whatever the user's home says.
    cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)
    try:
        import openvino
    except (ImportError, OSError) as error:
        expected = "expected an installation with the extra openvino"
        raise EngineError(f"openvino: {expected}, got {error}") from error
    return openvino


@functools.cache
def _core() -> Any:
    return load_openvino().Core()


@dataclass(frozen=True)
class Settings:
    """Settings of compiled graphs."""

    precision: str
    threads: int

    @property
    def description(self) -> str:
        """All that the bits of an answer depend on, beside graph, batch size and processor."""
        version = str(load_openvino().get_version()).partition("-")[0]
        return f"openvino {version} {self.precision}, threads {self.threads}, hint {_HINT.lower()}"

    def check(self) -> None:
        """Raise EngineError if the processor lacks the precision."""
        capability = _CAPABILITIES.get(self.precision, "")
        found = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if capability not in found:
            expected = "one of " + ", ".join(n for n, c in _CAPABILITIES.items() if c in found)
            raise PrecisionError(
                f"precision: expected {expected} for openvino on this processor, "
                f"got {self.precision}"
            )

    def properties(self) -> dict[str, Any]:
        """Return them as OpenVINO's."""
        return {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[self.precision],
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": _HINT,
            # Other models of the process compute on the same cores, and a container may have few.
            "ENABLE_CPU_PINNING": False,
        }


class Compiled:
    """A graph compiled for one batch size; threads may call it at the same time.

    Args:
        graph: of this batch size; other axes may be open.
        settings: of the compilation.
        batched: whether each input has a row for each image; others have one value for all.

    Raises:
        EngineError: OpenVINO cannot compile it, or computes it in another precision.
    """

    def __init__(self, graph: Any, settings: Settings, batched: Sequence[bool]) -> None:
        try:
            self._compiled = _core().compile_model(graph, "CPU", settings.properties())
        except RuntimeError as error:
            raise EngineError(f"openvino cannot compile the graph: {_last_line(error)}") from error
        used = self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if used != _PRECISIONS[settings.precision]:
            expected = _PRECISIONS[settings.precision]
            raise EngineError(f"openvino: expected to compute in {expected}, got {used}")
        self._batched = tuple(batched)
        self._local = threading.local()

    def __call__(self, inputs: Sequence[Array], batch: int) -> npt.NDArray[np.float32]:
        """Return the first output, [B, …] float32.

        Args:
            inputs: in the order of the graph's inputs, [B, …] with B ≤ batch where batched.
            batch: that it was compiled for; missing images are zeros.
        """
        request = self._request()
        for i, (array, batched) in enumerate(zip(inputs, self._batched, strict=True)):
            tensor = request.get_input_tensor(i)
            shape = [batch, *array.shape[1:]] if batched else list(array.shape)
            if list(tensor.shape) != shape:
                tensor.shape = shape  # of an open axis
            data = tensor.data
            if batched and len(array) < batch:
                data[: len(array)], data[len(array) :] = array, 0
            else:
                data[...] = array
        # Not copied a first time, into a dictionary.
        request.infer(share_outputs=True)
        # Of the caller alone: the request overwrites its own at the next call.
        answer: npt.NDArray[np.float32] = request.get_output_tensor(0).data.astype(np.float32)
        return answer

    def _request(self) -> Any:
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._compiled.create_infer_request()
        return request


def _last_line(error: BaseException) -> str:
    """Return the line of an exception that says what is wrong; those before name source files."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from", "Check "))]
    return (said or lines or [type(error).__name__])[0][:300]
