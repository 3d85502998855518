"""Loaded model: its denoisers, queue, cost model and statistics."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from els_kernels import ComputationStoppedError
from els_service.config import Scheduling
from els_service.denoisers.base import Denoised, Denoiser, LatentDecoder, Query, concatenate
from els_service.engine.budget import Budget
from els_service.engine.costs import CostModel
from els_service.engine.decoding import DecoderAsDenoiser
from els_service.engine.derived import COMPUTATIONS, Computation, derived
from els_service.engine.device import breaks_device, free_memory, is_memory_shortage
from els_service.engine.estimates import step_estimates
from els_service.engine.fair_queue import FairQueue
from els_service.engine.request_context import PRIORITIES, RequestContext
from els_service.engine.reservations import NamedBudget, Reservation
from els_service.errors import ResourceExhaustedError, UnavailableError

_PENDING = 256
"""Maximum number of queries that a version's statistics have not aggregated yet."""


@dataclass(slots=True)
class DurationSum:
    """Number of events and their total duration."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class Statistics:
    """Statistics of one version of a model since it was loaded."""

    succeeded: DurationSum = field(default_factory=DurationSum)
    failed: DurationSum = field(default_factory=DurationSum)
    queued: DurationSum = field(default_factory=DurationSum)
    computed: DurationSum = field(default_factory=DurationSum)
    """Queries, each with the whole time of its batch."""
    batches: dict[int, DurationSum] = field(default_factory=dict)
    """Number of images → batches of that size."""
    last: float = 0.0
    """Time of the latest computation, in seconds since the epoch."""
    pending: deque[tuple[int, float, bool]] = field(default_factory=deque)
    """Images, seconds and success of queries that ``settle`` has not aggregated yet."""

    def batch(self, images: int, seconds: float, now: float) -> None:
        """Count a batch."""
        self.last = now
        batches = self.batches.get(images)
        if batches is None:
            batches = self.batches[images] = DurationSum()
        batches.add(seconds)

    def at_once(self, images: int, seconds: float, now: float, *, succeeded: bool) -> None:
        """Add a query that was computed on arrival, as a batch of its own."""
        # Aggregated later, as this is called for every small request.
        self.last = now
        self.pending.append((images, seconds, succeeded))
        if len(self.pending) >= _PENDING:
            self.settle()

    def settle(self) -> Statistics:
        """Aggregate what ``at_once`` added; return the statistics."""
        now, pending = self.last, self.pending
        while pending:
            images, seconds, succeeded = pending.popleft()
            self.batch(images, seconds, now)
            self.queued.add(0.0)
            self.computed.add(seconds)
            (self.succeeded if succeeded else self.failed).add(seconds)
        return self


class LoadedModel:
    """Loaded version of a model, with its queue, which is served even after a reload.

    Args:
        model: name of the model.
        version: number of the version.
        denoisers: device → denoiser on it; each is called by one thread at a time.
        scheduling: bounds of the queue.
        costs: calibrated cost model; None for a new one.
    """

    def __init__(
        self,
        model: str,
        version: int,
        denoisers: Mapping[str, Denoiser],
        scheduling: Scheduling,
        costs: CostModel | None = None,
    ) -> None:
        self.model, self.version, self.denoisers = model, version, denoisers
        self.denoiser = next(iter(denoisers.values()))
        """One of them, for properties that are the same on all devices."""
        self.queue: FairQueue[Chunk] = FairQueue(PRIORITIES, scheduling.starvation_s)
        name = f"the queue of {model}"
        self.seconds = NamedBudget(Budget(scheduling.queue_s), name, seconds=True)
        """Predicted seconds of waiting requests, and of one step of each trajectory."""
        self.bytes = NamedBudget(Budget(scheduling.queue_bytes), name, seconds=False)
        """Bytes of waiting requests."""
        self.budgets = self.seconds, self.bytes
        self.costs = costs or CostModel()
        self.statistics = Statistics()
        self.virtual = 0.0
        """Virtual time of the scheduler: device seconds received."""
        self.running = 0
        """Number of batches under computation."""
        self.on_cpu = "cpu" in denoisers
        """Whether small queries may be computed on the event loop."""
        self.slow = 0
        """Number of slow inline answers in a row."""
        self.purged = 0.0
        """Time of the latest search for late chunks."""
        decoders = {
            device: DecoderAsDenoiser(denoiser)
            for device, denoiser in denoisers.items()
            if isinstance(denoiser, LatentDecoder)
        }
        self.decoder = LoadedModel(model, version, decoders, scheduling) if decoders else None
        """Queue of latents to decode; None for a model without a decoder."""
        self.derived: dict[Computation, LoadedModel] = {}
        """Queues of other computations than ``denoise`` that the model supports."""
        for computation in COMPUTATIONS:
            others = {
                device: other
                for device, denoiser in denoisers.items()
                if (other := derived(denoiser, computation)) is not None
            }
            if others:
                self.derived[computation] = LoadedModel(model, version, others, scheduling)

    @property
    def queues(self) -> Iterator[LoadedModel]:
        """This model, its decoder and its other computations."""
        yield self
        if self.decoder is not None:
            yield self.decoder
        yield from self.derived.values()

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step of one image, the mean of a sample of ``STEPS`` steps."""
        return sum(map(self.costs.seconds, self._step_estimates)) / len(self._step_estimates)

    @cached_property
    def _step_estimates(self) -> list[float]:
        return step_estimates(self.denoiser)

    @property
    def waiting_s(self) -> float:
        """Predicted seconds of all waiting chunks."""
        return self.costs.marginal(self.queue.cost)

    def take(self, chunk: Chunk, now: float) -> None:
        """Remove a chunk that will be computed from the queue, and its part from the budgets."""
        self.queue.take(chunk, now)
        pending = chunk.pending
        before, pending.waiting = pending.waiting, pending.waiting - len(chunk.query)
        if pending.reservation is not None:
            pending.reservation.begin(self.budgets, pending.waiting / before)

    def withdraw(self, pending: PendingRequest) -> bool:
        """Remove the waiting chunks of a request from queue and budgets; return whether any did."""
        waiting = [chunk for chunk in pending.chunks if chunk.waiting]
        for chunk in waiting:
            self.queue.drop(chunk)
        if pending.reservation is not None:
            pending.reservation.release(*self.budgets)
        return bool(waiting)


class PendingRequest:
    """Query and the future of its answer, computed in one chunk or several."""

    def __init__(self, model: str, query: Query, context: RequestContext, since: float) -> None:
        self.model, self.query, self.context, self.since = model, query, context, since
        self.caller = context.name()
        self.answer: asyncio.Future[Denoised] = asyncio.get_running_loop().create_future()
        self.chunks: list[Chunk] = []
        self.waiting = len(query)
        """Number of images that have not been taken from the queue."""
        self.reservation: Reservation | None = None
        """None for a query of a trajectory, which has a reservation of its own."""
        self._missing = 0
        self._parts: list[Denoised | None] = []

    def split(self, estimate: float, most: float) -> list[Chunk]:
        """Return the chunks of the query, each estimated at ``most`` or less.

        A chunk of a single image may exceed it.
        """
        images = len(self.query)
        step = max(1, min(images, int(images * most / max(estimate, 1e-9))))
        parts = [self.query] if step == images else list(_slices(self.query, step))
        self._missing, self._parts = len(parts), [None] * len(parts)
        share = max(estimate, 1e-9) / images
        self.chunks = [Chunk(self, i, part, share * len(part)) for i, part in enumerate(parts)]
        return self.chunks

    def release(self) -> None:
        """Release its reservation."""
        if self.reservation is not None:
            self.reservation.release()
            # Breaks a cycle that would live until garbage collection.
            self.reservation = None

    def complete(self, index: int, part: Denoised) -> bool:
        """Store the result of one chunk; return whether the answer is complete."""
        self._parts[index] = part
        self._missing -= 1
        if self._missing:
            return False
        self.answer.set_result(_join([part for part in self._parts if part is not None]))
        return True


class Chunk:
    """Part of a query that is queued and computed as a whole."""

    __slots__ = ("caller", "cost", "index", "pending", "priority", "query", "size", "waiting")

    def __init__(self, pending: PendingRequest, index: int, query: Query, cost: float) -> None:
        self.pending, self.index, self.query, self.cost = pending, index, query, cost
        self.priority, self.caller = pending.context.priority, pending.caller
        self.size = query.nbytes
        self.waiting = False


def answers(denoiser: Denoiser, queries: Sequence[Query]) -> list[Denoised | Exception]:
    """Return the answer or the error of each query, computed as one batch.

    A batch that fails is halved until the failing query is alone; if memory does not suffice, down
    to single images. Runs on the thread of a device.

    Raises:
        ComputationStoppedError: All queries were cancelled.
        Exception: The device is broken.
    """
    try:
        together = denoiser.denoise(concatenate(queries))
    except Exception as error:
        if isinstance(error, ComputationStoppedError) or breaks_device(error):
            raise
        short = is_memory_shortage(error)
        if short:
            free_memory()
        if isinstance(error, UnavailableError):
            # Of no query: the others would fail, or wait, in the same way.
            return [error] * len(queries)
        if len(queries) > 1:
            middle = len(queries) // 2
            return answers(denoiser, queries[:middle]) + answers(denoiser, queries[middle:])
        return [_in_halves(denoiser, queries[0]) if short else error]
    ends = np.cumsum([len(query) for query in queries]).tolist()
    return [together[end - len(query) : end] for query, end in zip(queries, ends, strict=True)]


def _in_halves(denoiser: Denoiser, query: Query) -> Denoised | Exception:
    """Return the answer to a query that does not fit in memory as a whole."""
    if len(query) == 1:
        return ResourceExhaustedError("x.shape", "an image that the memory suffices for", "more")
    parts: list[Denoised] = []
    for half in _slices(query, (len(query) + 1) // 2):
        (part,) = answers(denoiser, [half])
        if isinstance(part, Exception):
            return part
        parts.append(part)
    return _join(parts)


def _slices(query: Query, step: int) -> Iterator[Query]:
    for first in range(0, len(query), step):
        yield query[first : first + step]


def _join(parts: Sequence[Denoised]) -> Denoised:
    if len(parts) == 1:
        return parts[0]
    evidence = [part.log_evidence for part in parts if part.log_evidence is not None]
    pixels = np.concatenate([part.pixels for part in parts])
    return Denoised(pixels, np.concatenate(evidence) if evidence else None)
