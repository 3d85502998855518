"""Gauges of the engine, for metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from els_service.engine.budget import Budget
from els_service.engine.device import Device
from els_service.engine.registry import ModelRegistry


def gauges(
    models: ModelRegistry, devices: Sequence[Device], memory: Budget, trajectories: int
) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield the current value of each gauge: name, labels, value.

    Args:
        models: registry of served models.
        devices: of the engine.
        memory: budget of requests in flight, in bytes.
        trajectories: number in flight.
    """
    waiting_s = 0.0
    for served in models:
        # Read once, because this runs in another thread and the model may be unloaded.
        loaded = served.loaded
        if loaded is not None:
            labels = {"model": served.model}
            for each in loaded.queues:
                waiting_s += each.waiting_s
                yield "els_queue_items", labels, len(each.queue)
                yield "els_queue_cost_seconds", labels, each.waiting_s
                yield "els_queue_reserved_seconds", labels, each.seconds.budget.used
    yield "els_queue_milliseconds", {}, round(1e3 * waiting_s)
    for model, size in models.memory().items():
        yield "els_model_memory_bytes", {"model": model}, size
    for device in devices:
        yield "els_device_busy_seconds_total", {"device": device.name}, device.busy_s
        yield "els_device_running_seconds", {"device": device.name}, device.running_s
        yield "els_device_stalled_seconds", {"device": device.name}, device.stalled_s
    for model, refused in models.refused().items():
        yield "els_model_refused", {"model": model}, refused
    yield "els_memory_in_flight_bytes", {}, memory.used
    yield "els_memory_in_flight_limit_bytes", {}, memory.capacity
    yield "els_trajectories", {}, trajectories
