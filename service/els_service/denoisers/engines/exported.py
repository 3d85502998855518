"""onnxruntime: sessions of graphs, and torch modules exported to graphs.

What one would not guess, and what is done about it here:

- Threads of a session spin on their cores after a call, for up to a second by default. They spin
  for ``_SPIN_US``, which covers the pauses between operators and between calls; without any, a
  small network takes a tenth longer.
- Tracing fixes what depends on values, and may fix a batch size. Answers are compared with known
  ones in batches of several sizes, other than the example's.
- torch's exporter of traced modules sets state of the whole process. Exports take turns.
- CPU kernels of bfloat16 and float16 are lacking or slower than those of float32, the only
  precision here.
"""

from __future__ import annotations

import functools
import io
import threading
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from els_kernels import checkpoint
from els_service.denoisers.engines.buckets import worth_trying
from els_service.denoisers.engines.options import EngineError, PrecisionError
from els_service.denoisers.engines.probe import ERRORS, Array, Probe

SIZES = (1, 4, 16, 64)
"""Batch sizes that are compared with known answers and timed."""
_SPIN_US = 100
"""Microseconds for which an idle thread waits on its core."""
_OUTPUT = "output"
_EXPORT = threading.Lock()


@functools.cache
def load_onnxruntime() -> Any:
    """Return the package.

    Raises:
        EngineError: It is not installed, or cannot be loaded.
    """
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        expected = "expected an installation with the extra onnx"
        raise EngineError(f"onnxruntime: {expected}, got {error}") from error
    return onnxruntime


def session_of(model: bytes | Path, threads: int) -> Any:
    """Return a session on the CPU, which threads may call at the same time.

    Args:
        model: content of an ONNX file, or its path if it has external data.
        threads: of one computation.

    Raises:
        EngineError: onnxruntime is not installed, or rejects the graph.
    """
    library = load_onnxruntime()
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    try:
        return library.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime's exceptions have no common class.
        raise EngineError(f"onnxruntime rejects the graph: {_one_line(error)}") from error


def check_precision(precision: str) -> None:
    """Raise PrecisionError for any but float32."""
    if precision != "float32":
        raise PrecisionError(f"precision: expected float32 for onnxruntime, got {precision}")


def description_of(threads: int) -> str:
    """Return all that the bits of an answer depend on, beside graph, batch size and processor."""
    return f"onnxruntime {load_onnxruntime().__version__} float32, threads {threads}"


def onnx_of_module(
    module: nn.Module, names: Sequence[str], example: Sequence[Tensor], opened: Collection[str]
) -> bytes:
    """Return the ONNX graph of a module in evaluation mode, with its weights and an open batch.

    Args:
        module: takes and returns float32 tensors [B, …].
        names: of its arguments.
        example: its arguments on the CPU, of at least two images, as axes of one may be fixed.
        opened: names of arguments whose second axis differs between calls.

    Raises:
        EngineError: torch cannot export it, as if it is larger than the 2 GiB of a protobuf.
    """
    file = io.BytesIO()
    batch = {name: {0: "batch"} for name in (*names, _OUTPUT)}
    rows = {name: {0: "batch", 1: "rows"} for name in opened}
    try:
        with _EXPORT, torch.no_grad(), warnings.catch_warnings():
            # What depends on values is found by known answers.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                tuple(example),
                cast(Any, file),  # which its annotation omits
                input_names=list(names),
                output_names=[_OUTPUT],
                dynamic_axes=batch | rows,
                # By tracing, which needs no further packages and takes a second.
                dynamo=False,
            )
    except Exception as error:
        # Of torch, of several classes.
        raise EngineError(
            f"onnxruntime: torch cannot export the network: {_one_line(error)}"
        ) from error
    return file.getvalue()


class OnnxruntimeRunner:
    """A module computed by onnxruntime; see ``probe.Runner``.

    Args:
        model: of ``onnx_of_module``.
        names: of the runner's inputs; those that the graph does not use are dropped.
        threads: of one computation.
        probe: known answers, compared at several batch sizes.
        buckets: batch sizes of the callers; empty for any, in launches of what is fastest.

    Raises:
        EngineError: The graph is rejected, or answers other than the probe.
    """

    def __init__(
        self,
        model: bytes,
        names: Sequence[str],
        threads: int,
        probe: Probe,
        buckets: Sequence[int] = (),
    ) -> None:
        self._session = session_of(model, threads)
        used = {node.name for node in self._session.get_inputs()}
        self._used = [(place, name) for place, name in enumerate(names) if name in used]
        self.description = description_of(threads)
        self.error = 0.0
        """Largest relative error of an image of the probe."""
        seconds: dict[int, float] = {}
        self.largest = max(buckets or SIZES)
        """Largest batch size of a launch."""
        for size in buckets or SIZES:
            if worth_trying(size, seconds, buckets):
                self._compare(size, probe)
                # Equal bits need equal launches at every load, and those of buckets are given.
                seconds[size] = 0.0 if buckets else probe.seconds(self, size)
        if not buckets:
            self.largest = min(seconds, key=lambda size: seconds[size] / size)

    def __call__(self, *inputs: Array) -> npt.NDArray[np.float32]:
        """Return F of inputs [B, …], any B."""
        given = {name: inputs[place] for place, name in self._used}
        count = len(inputs[0])
        if count <= self.largest:
            return self._launch(given)
        parts = []
        for first in range(0, count, self.largest):
            checkpoint()
            part = slice(first, first + self.largest)
            parts.append(self._launch({name: one[part] for name, one in given.items()}))
        return np.concatenate(parts)

    def _launch(self, given: dict[str, Array]) -> npt.NDArray[np.float32]:
        answer: npt.NDArray[np.float32] = self._session.run(None, given)[0]
        return answer

    def _compare(self, size: int, probe: Probe) -> None:
        try:
            found = probe.error(self, size)
        except Exception as error:
            # onnxruntime's exceptions have no common class.
            raise EngineError(f"onnxruntime: batches of {size} fail: {_one_line(error)}") from error
        budget = ERRORS["float32"]
        if not found <= budget:
            raise EngineError(
                f"onnxruntime: expected known answers within {budget:g} in float32, "
                f"got {found:.2g} in a batch of {size}"
            )
        self.error = max(self.error, found)


def _one_line(error: BaseException) -> str:
    return f"{' '.join(str(error).split()):.300}"
