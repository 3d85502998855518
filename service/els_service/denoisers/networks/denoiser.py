"""Denoiser of a trained network: batches, buckets, precision, determinism."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from els_kernels import checkpoint
from els_service.denoisers.answers import check_finite
from els_service.denoisers.base import Denoised, DenoiserInfo, Integers, Query
from els_service.denoisers.engines.modules import (
    COMPILED_BUCKETS,
    Function,
    allow_tf32,
    choose_engine,
    padded,
)
from els_service.denoisers.engines.options import EngineOptions
from els_service.denoisers.engines.probe import Array
from els_service.denoisers.gradients import Direction, Product, automatic_product, joined
from els_service.denoisers.guidance import denoise_guided, product_guided
from els_service.denoisers.levels import Floats
from els_service.denoisers.networks.config import Execution, NetworkConfig, NetworkDocument
from els_service.denoisers.networks.modules import Network, build_network
from els_service.denoisers.networks.parametrisation import parametrise
from els_service.denoisers.query_checks import check_query
from els_service.errors import InvalidArgumentError

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

_FLOPS_PER_SECOND = {"cpu": 1e11, "cuda": 3e13}
"""Approximate operations per second of a CPU thread and a GPU; determines batch sizes."""
_LAUNCH_S = 2e-4
"""Minimum duration of a call in seconds."""
_PRODUCT_COSTS = {"vjp": 3.0, "jvp": 6.0}
"""Cost of a Jacobian product in forward passes."""
_DETERMINISTIC_BUCKET = 8
_CPU_LAYER_BYTES = 2 << 20
"""Maximum bytes of one layer's output, so that it is still cached when the next layer reads it."""
_CPU_SMALLEST = 4
"""Minimum images of a launch on a CPU; fewer leave cores idle between layers."""
_LARGEST_BATCH = 64
"""Maximum images of a launch; a larger one is not faster and needs more memory."""


class NetworkDenoiser:
    """A trained network.

    Args:
        network: with its weights; the denoiser owns it: it is moved, cast and frozen.
        document: its configuration and execution options.
        device: device of the weights.
        source: the model, named in the log.

    Raises:
        ValueError: The device does not support ``document.execution``, a weight is too large for
            its precision, or results depend on the place in the batch with ``deterministic``.
    """

    def __init__(
        self,
        network: Network,
        document: NetworkDocument,
        device: torch.device | str = "cpu",
        source: object = "",
    ) -> None:
        self._config, self._execution = document.config, document.execution
        self._device = torch.device(device)
        if self._device.type != "cuda":
            _check_without_gpu(self._execution)
        network = network.to(self._device)
        network.set_layout(memory_format(self._execution.channels_last))
        self._buckets = _buckets(self._execution)
        self._engine, module = choose_engine(
            self._function(network.eval().requires_grad_(False)),
            self._device,
            self._options(),
            source,
        )
        # Differentiated as it is, whatever computes ``denoise``: both have the same weights.
        self._network: Forward = module
        self._dtype = next(iter(module.parameters())).dtype
        if self._engine.name == "compile" and not self._buckets:
            self._buckets = COMPILED_BUCKETS
        self._largest = self._launch_size()
        self._flops = count_flops(self._config)
        threads = torch.get_num_threads() if self._device.type == "cpu" else 1
        self._flops_per_second = threads * _FLOPS_PER_SECOND[self._device.type]
        self._info = self._describe(module, document)
        if self._execution.deterministic:
            self._check_batch_invariance()

    @property
    def info(self) -> DenoiserInfo:
        """Description; ``machine`` is the architecture, ``bank`` the training data."""
        return self._info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if shape or a label is wrong, or a window is given."""
        check_query(self._info, query)
        config = self._config
        if config.label_count and not config.null_label and (query.labels < 0).any():
            expected = f"0 to {config.label_count - 1}: this network requires a label"
            raise InvalidArgumentError("labels", expected, -1)

    def predict_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of operations, padding included."""
        guided = 0 if query.guidance is None else int((query.guidance != 1).sum())
        images = sum(bucket for _, bucket in self._launches(len(query) + guided))
        return _LAUNCH_S + images * self._flops / self._flops_per_second

    def denoise(self, query: Query) -> Denoised:
        """Return D(x), without evidence.

        Raises:
            ElsError: A result is not finite, for example if a pixel is too large for float16.
        """
        if query.guidance is not None:
            return denoise_guided(self.denoise, query)
        (images, bucket), *others = self._launches(len(query))
        if not others:
            return Denoised(self._denoise_part(query, bucket), None)
        parts = [self._denoise_part(query[images], bucket)]
        parts += [self._denoise_part(query[images], bucket) for images, bucket in others]
        return Denoised(np.concatenate(parts), None)

    def vjp(self, query: Query, cotangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and Jᵀg by automatic differentiation, in the network's precision.

        Where D is clipped its derivative is 0.

        Raises:
            ElsError: A result is not finite.
        """
        return self._product(query, cotangent, "vjp")

    def jvp(self, query: Query, tangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and J u by automatic differentiation; raises as ``vjp``."""
        return self._product(query, tangent, "jvp")

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return a multiple of the time of ``denoise``."""
        return _PRODUCT_COSTS[direction] * self.predict_seconds(query)

    def _product(self, query: Query, along: npt.NDArray[np.float32], kind: Direction) -> Product:
        if query.guidance is not None:
            return product_guided(partial(self._product, kind=kind), query, along)
        with allow_tf32(self._execution.precision == "tf32"):
            return joined(
                [
                    self._product_part(query[images], along[images], kind, bucket)
                    for images, bucket in self._launches(len(query))
                ]
            )

    def _product_part(
        self, query: Query, along: npt.NDArray[np.float32], kind: Direction, bucket: int
    ) -> Product:
        checkpoint()
        answer = automatic_product(
            lambda x: self._mean(query, x, bucket), query.pixels, along, kind
        )
        self._check_finite(answer.product)
        return answer

    def _denoise_part(self, query: Query, bucket: int) -> npt.NDArray[np.float32]:
        checkpoint()
        level = parametrise(self._config.prediction, query.level, self._config.sigma_data)
        # What overflows is found below, in the answer.
        with np.errstate(over="ignore", invalid="ignore"):
            c_in, c_skip, c_out = level.rows
            mean = self._run(query.pixels * c_in, level.time, query.labels, bucket)
            # A separate product and sum: fused ones could round differently by place in the batch.
            mean *= c_out
            mean += query.pixels * c_skip
        self._check_finite(mean)
        if self._execution.clip:
            within = True if query.unclipped is None else ~query.unclipped[:, None, None, None]
            np.clip(mean, -1, 1, out=mean, where=within)
        return mean

    def _run(
        self, scaled: npt.NDArray[np.float32], time: Floats, labels: Integers, bucket: int
    ) -> npt.NDArray[np.float32]:
        """Return the network's output for ``scaled`` [B, C, H, W], B ≤ bucket."""
        inputs: list[Array] = [scaled, time.astype(np.float32), self._rows(labels)]
        if bucket > len(scaled):
            inputs = [padded(one, bucket) for one in inputs]
        output: npt.NDArray[np.float32] = self._engine.run(*inputs)[: len(scaled)]
        return output

    def _check_finite(self, result: npt.NDArray[np.float32]) -> None:
        check_finite(result, "the network", f" in {self._engine.precision}")

    def _mean(self, query: Query, x: Tensor, bucket: int) -> Tensor:
        """Return D(x), [B, C, H, W] float32 on the CPU, for differentiation."""
        level = parametrise(self._config.prediction, query.level, self._config.sigma_data)
        padding = bucket - len(x)
        scaled = functional.pad(x * _column(level.c_in), (0, 0, 0, 0, 0, 0, 0, padding))
        time = functional.pad(torch.from_numpy(level.time).float(), (0, padding))
        rows = functional.pad(torch.from_numpy(self._rows(query.labels)), (0, padding))
        output = self._network(
            scaled.to(self._device, self._dtype), time.to(self._device), rows.to(self._device)
        )
        predicted = output[: len(x)].to(
            "cpu", torch.float32, memory_format=torch.contiguous_format, copy=True
        )
        mean = predicted.mul_(_column(level.c_out)).add_(x * _column(level.c_skip))
        self._check_finite(mean.detach().numpy())
        return mean.clamp(-1, 1) if self._execution.clip else mean

    def _rows(self, labels: Integers) -> Integers:
        """Return the rows of the label embedding; the last is that of no label."""
        if len(labels) == 1:
            return labels if labels[0] >= 0 else np.array([self._config.label_count])
        return np.where(labels < 0, self._config.label_count, labels)

    def _launches(self, images: int) -> Iterator[tuple[slice, int]]:
        """Yield the slices of a batch with their bucket sizes."""
        for first in range(0, images, self._largest):
            count = min(self._largest, images - first)
            bucket = next((size for size in self._buckets if size >= count), count)
            yield slice(first, first + count), bucket

    def _launch_size(self) -> int:
        """Return the most images of a launch; on a CPU torch's is limited by its caches."""
        if self._buckets:
            return self._buckets[-1]
        if self._engine.largest:
            return self._engine.largest
        if self._device.type != "cpu":
            return _LARGEST_BATCH
        _, height, width = self._config.shape
        layer = self._config.widths[0] * height * width * self._dtype.itemsize
        return min(_LARGEST_BATCH, max(_CPU_SMALLEST, _CPU_LAYER_BYTES // layer))

    def _options(self) -> EngineOptions:
        execution = self._execution
        return EngineOptions(
            engine="compile" if execution.compile != "none" else execution.engine,
            precision=execution.precision,
            threads=execution.threads,
            fallback=execution.fallback,
            deterministic=execution.deterministic,
            buckets=self._buckets,
        )

    def _function(self, network: Network) -> Function:
        config, mode = self._config, self._execution.compile
        labels = config.label_count + config.null_label

        def example(images: int) -> list[Array]:
            numbers = np.random.default_rng(0)
            x = numbers.standard_normal((images, *config.shape)).astype(np.float32)
            time = np.linspace(0.9, 0.1, images).astype(np.float32)
            return [x, time, np.arange(images, dtype=np.int64)[::-1] % max(labels, 1)]

        return Function(
            module=network,
            names=("x", "time", "labels"),
            cast=("x",),
            example=example,
            compile_mode="reduce-overhead" if mode == "cuda-graphs" else None,
        )

    def _check_batch_invariance(self) -> None:
        """Compare one image at every place of the bucket: libraries do not guarantee equality."""
        (bucket,) = self._buckets
        image = np.linspace(-2, 2, int(np.prod(self._config.shape)), dtype=np.float32)
        repeated = np.tile(image.reshape(1, *self._config.shape), (bucket, 1, 1, 1))
        time, labels = np.full(bucket, 0.5), np.zeros(bucket, np.int64)
        places = self._run(repeated, time, labels, bucket)
        alone = self._run(repeated[:1], time[:1], labels[:1], bucket)
        if not np.isfinite(alone).all():
            precision = self._engine.precision
            raise ValueError(f"deterministic: expected finite results in {precision}, got others")
        if not all(np.array_equal(place, alone[0]) for place in places):
            raise ValueError(
                f"deterministic: expected the same bits at every place of a batch of {bucket}, "
                f"got others by {self._engine.description} on this {self._device.type}; "
                "another bucket may do"
            )

    def _describe(self, module: nn.Module, document: NetworkDocument) -> DenoiserInfo:
        config, engine = self._config, self._engine
        return DenoiserInfo(
            kind="network",
            shape=config.shape,
            machine=config.architecture,
            padding=config.padding,
            schedule=config.schedule,
            label_count=config.label_count,
            label_names=config.label_names,
            label_guidance=bool(config.label_count) and config.null_label,
            bank=document.data,
            batch_invariant=self._execution.deterministic,
            has_gradients=True,
            implementation=engine.description + (", clipped" if self._execution.clip else ""),
            memory_bytes=sum(p.numel() * p.element_size() for p in module.parameters())
            + engine.memory_bytes,
            engine=engine.name,
            engine_reason=engine.reason,
            precision=engine.precision,
            precision_error=engine.error,
        )


def _check_without_gpu(execution: Execution) -> None:
    if execution.precision == "tf32":
        raise ValueError("precision: expected float32, bfloat16 or float16 on a CPU, got tf32")
    if execution.compile == "cuda-graphs":
        raise ValueError("compile: expected none or default on a CPU, got cuda-graphs")


def count_flops(config: NetworkConfig) -> int:
    """Return the floating-point operations of convolutions and products for one image."""
    # Names of labels may be many, and do not matter.
    return _count_flops(dataclasses.replace(config, label_names=()))


@lru_cache(64)
def _count_flops(config: NetworkConfig) -> int:
    """Count them once: it takes a tenth of a second, and models are reloaded."""
    # Local import: it imports triton, which a server without networks does not need.
    from torch.utils.flop_counter import FlopCounterMode

    network = build_network(config, "meta")
    x = torch.empty(1, *config.shape, device="meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(x, torch.empty(1, device="meta"), torch.empty(1, dtype=torch.int64, device="meta"))
    return int(counter.get_total_flops())


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return torch's memory format of a layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


def _buckets(execution: Execution) -> tuple[int, ...]:
    if execution.buckets:
        return execution.buckets
    if execution.deterministic:
        return (_DETERMINISTIC_BUCKET,)
    return ()


def _column(values: Floats) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).view(-1, 1, 1, 1)
