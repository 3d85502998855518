"""Engines of a torch module: eager, compiled by torch, or converted for another library."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from els_service.denoisers.engines.buckets import SIZES
from els_service.denoisers.engines.choice import Builder, Engine, choose
from els_service.denoisers.engines.converted import Inputs, OpenvinoRunner, graph_of_module
from els_service.denoisers.engines.exported import (
    SIZES as EXPORTED_SIZES,
)
from els_service.denoisers.engines.exported import (
    OnnxruntimeRunner,
    check_precision,
    load_onnxruntime,
    onnx_of_module,
)
from els_service.denoisers.engines.options import EngineError, EngineOptions
from els_service.denoisers.engines.probe import ERRORS, Array, Probe
from els_service.denoisers.engines.runtime import Settings

COMPILED_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes that torch.compile compiles, each at its first use."""
ON_CPU = ("openvino", "onnxruntime")
"""Engines that compute on a CPU alone, from a graph made of the module in float32."""
_PROBED = 3
"""Images of a probe: not a bucket, so that batches are padded and repeat them."""


@dataclass(frozen=True)
class Function:
    """The function F of a network as a torch module, and how it is called."""

    module: nn.Module
    """In float32, evaluation mode and on its device."""
    names: tuple[str, ...]
    """Of its arguments, [B, …] each."""
    cast: tuple[str, ...]
    """Arguments that are given in the precision of the weights."""
    example: Callable[[int], Sequence[Array]]
    """Number of images → inputs that differ in each image; some numbers are negative."""
    open: tuple[str, ...] = ()
    """Arguments whose second axis differs between calls."""
    compile_mode: str | None = None
    """Mode of torch.compile."""


class TorchRunner:
    """A torch module as a runner; see ``probe.Runner``.

    Args:
        module: eager or compiled.
        device: of its weights.
        dtypes: dtype to which each argument is cast; None for its own.
        tf32: whether float32 products may round their inputs to TF32 on a GPU.
    """

    def __init__(
        self,
        module: Callable[..., Tensor],
        device: torch.device,
        dtypes: Sequence[torch.dtype | None],
        *,
        tf32: bool = False,
    ) -> None:
        self._module, self._device, self._tf32 = module, device, tf32
        self._dtypes = tuple(dtypes)

    def __call__(self, *inputs: Array) -> npt.NDArray[np.float32]:
        """Return F of inputs [B, …]."""
        if self._device.type == "cpu":
            return self._run(inputs)
        with allow_tf32(self._tf32):
            return self._run(inputs)

    def of(self, module: Callable[..., Tensor]) -> TorchRunner:
        """Return the runner of the same module in another form."""
        return TorchRunner(module, self._device, self._dtypes, tf32=self._tf32)

    def _run(self, inputs: Sequence[Array]) -> npt.NDArray[np.float32]:
        given = zip(inputs, self._dtypes, strict=True)
        with torch.inference_mode():
            tensors = [torch.from_numpy(one).to(self._device, dtype) for one, dtype in given]
            answer: npt.NDArray[np.float32] = (
                self._module(*tensors)
                .to("cpu", torch.float32, memory_format=torch.contiguous_format, copy=True)
                .numpy()
            )
        return answer


class PaddedRunner:
    """A runner whose batches are padded to the next of some sizes, or split by the largest."""

    def __init__(self, run: TorchRunner, buckets: Sequence[int]) -> None:
        self._run, self._buckets = run, tuple(buckets)

    def __call__(self, *inputs: Array) -> npt.NDArray[np.float32]:
        """Return F of inputs [B, …]."""
        largest, count = self._buckets[-1], len(inputs[0])
        parts = []
        for first in range(0, count, largest):
            taken = [one[first : first + largest] for one in inputs]
            images = len(taken[0])
            bucket = next(size for size in self._buckets if size >= images)
            parts.append(self._run(*(padded(one, bucket) for one in taken))[:images])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def padded(rows: Array, count: int) -> Array:
    """Return rows with zeros behind them, [count, …] in a new array."""
    result = np.zeros((count, *rows.shape[1:]), rows.dtype)
    result[: len(rows)] = rows
    return result


def choose_engine(
    function: Function, device: torch.device, options: EngineOptions, source: object
) -> tuple[Engine, nn.Module]:
    """Return the engine of a module, and the module to differentiate.

    The latter has the precision of the engine if that is torch's, else float32.

    Args:
        function: the network.
        device: of its weights; engines other than torch's compute on the CPU only.
        options: of ``model.yaml`` and the server.
        source: the model, named in the log.

    Raises:
        EngineError: The machine lacks the engine or precision, and ``fallback`` is off.
    """
    modules = _Modules(function, device, options)
    builders: dict[str, Builder] = {
        "torch": modules.eager,
        "openvino": modules.converted,
        "onnxruntime": modules.exported,
        "compile": modules.compiled,
    }
    if device.type != "cpu":
        builders |= {name: partial(_refused, name) for name in ON_CPU}
    engine = choose(options, builders, lambda: modules.probe, source)
    own = engine.name in ("torch", "compile")
    return engine, modules.differentiable[engine.precision if own else "float32"]


def _refused(name: str, precision: str) -> Engine:
    raise EngineError(f"engine: expected torch or compile on a GPU, got {name}")


class _Modules:
    """Builders of the engines of one module, which share a probe."""

    def __init__(self, function: Function, device: torch.device, options: EngineOptions) -> None:
        self._function, self._device, self._options = function, device, options
        self.differentiable = {"float32": function.module}
        """Precision → eager module."""

    @cached_property
    def probe(self) -> Probe:
        """Answers of the eager module in float32."""
        inputs = self._function.example(_PROBED)
        run = TorchRunner(self._function.module, self._device, (None,) * len(inputs))
        return Probe(inputs, run(*inputs))

    def eager(self, precision: str) -> Engine:
        """Return the module itself."""
        run, error = self._in_precision(precision)
        return Engine("torch", run, precision, f"torch {precision}", error)

    def compiled(self, precision: str) -> Engine:
        """Return the module compiled by torch, for each batch size at its first use."""
        on_cpu = self._device.type == "cpu"
        if on_cpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise EngineError("compile: expected a C++ compiler, found none")
        eager, error = self._in_precision(precision)
        module = self.differentiable[precision]
        buckets = self._options.buckets or COMPILED_BUCKETS
        # Buckets keep the number of shapes small; each is compiled at its first use.
        form = torch.compile(module, dynamic=False, mode=self._function.compile_mode)
        run = PaddedRunner(eager.of(form), buckets)
        if on_cpu:
            # A graph of a GPU belongs to the thread that makes it, which is the device's.
            error = max(error, self._compare(run, precision, buckets[0]))
        return Engine("compile", run, precision, f"torch.compile {precision}", error)

    def converted(self, precision: str) -> Engine:
        """Return the module converted to OpenVINO, from the same weights."""
        settings = Settings(precision, self._options.thread_count)
        settings.check()
        function, example = self._function, self._example(SIZES)
        graph = graph_of_module(function.module, example)
        inputs = Inputs(
            function.names,
            (True,) * len(function.names),
            tuple(
                (-1, *one.shape[2:]) if name in function.open else tuple(one.shape[1:])
                for name, one in zip(function.names, example, strict=True)
            ),
        )
        run = OpenvinoRunner(graph, inputs, settings, self.probe, self._options.buckets)
        numbers = sum(parameter.numel() for parameter in function.module.parameters())
        return Engine(
            "openvino",
            run,
            precision,
            run.description,
            run.error,
            largest=run.largest,
            memory_bytes=len(run.seconds) * numbers * dtype_of(precision).itemsize,
        )

    def exported(self, precision: str) -> Engine:
        """Return the module exported to ONNX and computed by onnxruntime, from the same weights."""
        check_precision(precision)
        load_onnxruntime()
        function, threads = self._function, self._options.thread_count
        example = self._example(EXPORTED_SIZES)
        model = onnx_of_module(function.module, function.names, example, function.open)
        run = OnnxruntimeRunner(model, function.names, threads, self.probe, self._options.buckets)
        return Engine(
            "onnxruntime",
            run,
            precision,
            run.description,
            run.error,
            largest=run.largest,
            memory_bytes=len(model),
        )

    def _example(self, sizes: Sequence[int]) -> list[Tensor]:
        """Return inputs to trace with.

        They are of another size than a batch that is computed, and the negative of the probe's
        images: what is fixed to size or values is then found.
        """
        images = 3 if 2 in (self._options.buckets or sizes) else 2
        first, *others = map(torch.from_numpy, self._function.example(images))
        return [-first, *others]

    def _in_precision(self, precision: str) -> tuple[TorchRunner, float]:
        """Return the runner of the eager module, and its error; the first call casts it."""
        dtype = dtype_of(precision)
        module = self.differentiable.get(precision)
        if module is None:
            module = self.differentiable["float32"]
            if dtype != torch.float32:
                _ = self.probe  # computed before the weights are cast
                if self._options.engine in ("auto", *ON_CPU):
                    module = copy.deepcopy(module)
                module = module.to(dtype)
                _check_weights(module, precision)
            self.differentiable[precision] = module
        dtypes = [dtype if name in self._function.cast else None for name in self._function.names]
        run = TorchRunner(module, self._device, dtypes, tf32=precision == "tf32")
        return run, 0.0 if precision == "float32" else self.probe.error(run, _PROBED)

    def _compare(self, run: PaddedRunner, precision: str, batch: int) -> float:
        try:
            found = self.probe.error(run, batch)
        except Exception as error:
            # Of torch's compiler, or of the C++ compiler that it calls.
            text = " ".join(str(error).split())
            raise EngineError(f"compile: torch cannot compile the network: {text:.300}") from error
        if not found <= ERRORS[precision]:
            expected = f"expected known answers within {ERRORS[precision]:g} in {precision}"
            raise EngineError(f"compile: {expected}, got {found:.2g}")
        return found


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of weights in a precision."""
    dtype: torch.dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    return dtype


def _check_weights(module: nn.Module, precision: str) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(
                f"{name}: expected numbers within the range of {precision}, got others"
            )


@contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """Set temporarily whether float32 products may round their inputs to TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
