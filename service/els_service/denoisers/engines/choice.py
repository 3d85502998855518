"""Choice of the engine of a network: the one that is named, or the fastest."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from els_service.denoisers.engines.options import EngineError, EngineOptions, PrecisionError
from els_service.denoisers.engines.probe import Array, Probe, Runner

_log = logging.getLogger(__name__)

NOT_MEASURED = ("compile",)
"""Engines that ``auto`` leaves out: each batch size takes tens of seconds to compile."""
COMPARED = (1, 4, 16)
"""Batch sizes that ``auto`` compares."""
_GAIN = 0.97
"""Fraction of the chosen engine's seconds below which another computes batches of a size."""
_SLOW_S = 0.25
"""Seconds of a launch from which ``auto`` compares no larger batch."""


@dataclass(frozen=True)
class Engine:
    """Engine of a network."""

    name: str
    """``torch``, ``compile``, ``onnxruntime`` or ``openvino``; of ``auto`` also two or more of
    them, joined by ``+``, in the order of the batch sizes that they compute."""
    run: Runner
    precision: str
    description: str
    """Identity of the implementation, on which the bits of an answer depend."""
    error: float = 0.0
    """Relative error of the network's answers, against its own engine in float32."""
    reason: str = ""
    """Why it was chosen; empty if it is what was asked for."""
    largest: int = 0
    """Largest batch of a launch; 0 for any."""
    memory_bytes: int = 0
    """Approximate size of what it holds beside the network's own weights."""


Builder = Callable[[str], Engine]
"""Precision → engine; raises EngineError."""
Builders = Mapping[str, Builder]
"""Engine → its builder; the first is the network's own, which always computes."""
Seconds = dict[str, dict[int, float]]
"""Engine → batch size → seconds of a call."""


def choose(
    options: EngineOptions,
    builders: Builders,
    probe: Callable[[], Probe],
    source: object,
    batches: Sequence[int] = COMPARED,
) -> Engine:
    """Return the engine of a network, and log why it was chosen.

    Args:
        options: of ``model.yaml`` and the server.
        builders: of all engines.
        probe: returns known answers, for the comparison of ``auto``.
        source: the model, named in the log.
        batches: batch sizes to compare, increasing.

    Raises:
        EngineError: The machine lacks the engine or precision, and ``fallback`` is off.
    """
    own = next(iter(builders))
    if options.engine == "auto" and options.deterministic:
        reason = f"{own}, as a measured choice may be another at the next load: deterministic"
        engine = dataclasses.replace(_built(options, builders, own), reason=reason)
    elif options.engine == "auto":
        engine = _fastest(options, builders, probe, batches)
    else:
        engine = _named(options, builders)
    extra = {
        "source": str(source),
        "engine": engine.name,
        "precision": engine.precision,
        "error": float(f"{engine.error:.2g}"),
        "reason": engine.reason,
    }
    if engine.name != options.engine != "auto" or engine.precision != options.precision:
        _log.warning("engine replaced", extra=extra)
    elif engine.reason or engine.error:
        _log.info("engine chosen", extra=extra)
    return engine


def _named(options: EngineOptions, builders: Builders) -> Engine:
    own = next(iter(builders))
    try:
        return _built(options, builders, options.engine)
    except EngineError as error:
        if options.engine == own or not options.fallback:
            raise
        fallback = _built(options, builders, own)
        return dataclasses.replace(fallback, reason=_joined(str(error), fallback.reason))


def _built(options: EngineOptions, builders: Builders, name: str) -> Engine:
    """Return an engine, in float32 if the processor lacks the precision and that is allowed."""
    if name not in builders:
        expected = "expected one of " + ", ".join((*builders, "auto"))
        raise EngineError(f"engine: {expected} for this kind of model, got {name}")
    try:
        return builders[name](options.precision)
    except PrecisionError as error:
        if not options.fallback:
            raise
        engine = builders[name]("float32")
        return dataclasses.replace(engine, reason=_joined(str(error), engine.reason))


def _fastest(
    options: EngineOptions,
    builders: Builders,
    probe: Callable[[], Probe],
    batches: Sequence[int],
) -> Engine:
    """Return the engine that takes least time, or those that do at some batch sizes."""
    built: dict[str, Engine] = {}
    notes = []
    for name in builders:
        if name in NOT_MEASURED:
            notes.append(f"{name} is not measured, as it takes long to compile")
            continue
        try:
            built[name] = _built(options, builders, name)
        except EngineError as error:
            notes.append(str(error))
    if not built:
        raise EngineError("; ".join(notes))
    seconds: Seconds = {name: {} for name in built}
    if len(built) > 1:
        seconds = _compared(built, probe(), batches)
    winners = _winners(built, seconds)
    if len(built) > 1:
        notes.insert(0, "; ".join(_described(name, seconds[name]) for name in built))
    chosen = _by_batch({first: built[name] for first, name in winners.items()})
    return dataclasses.replace(chosen, reason=_joined(*notes, chosen.reason))


def _winners(built: Mapping[str, Engine], seconds: Seconds) -> dict[int, str]:
    """Return the engines that compute batches: smallest batch size of each range → engine.

    One computes all sizes, that of least time on average, unless another of the same precision
    takes clearly less at some size.
    """
    best = min(seconds, key=lambda name: math.prod(seconds[name].values()))
    winners: dict[int, str] = {}
    for batch, own in seconds[best].items():
        rivals = [name for name in built if built[name].precision == built[best].precision]
        fastest = min(rivals, key=lambda name: seconds[name][batch])
        name = fastest if seconds[fastest][batch] < _GAIN * own else best
        if name not in list(winners.values())[-1:]:
            winners[batch if winners else 1] = name
    return winners or {1: best}


def _by_batch(engines: Mapping[int, Engine]) -> Engine:
    """Return the engine that computes a batch by the one of its size.

    Args:
        engines: smallest batch size of each range → its engine; the first is 1.
    """
    first, *others = engines.values()
    if not others:
        return first
    distinct = {engine.name: engine for engine in engines.values()}
    sizes = sorted(engines, reverse=True)

    def run(*inputs: Array) -> npt.NDArray[np.float32]:
        count = max(len(one) for one in inputs if one.ndim)
        answer: npt.NDArray[np.float32] = engines[
            next(size for size in sizes if size <= count)
        ].run(*inputs)
        return answer

    ranges = ", ".join(f"{engine.name} from batch {size}" for size, engine in engines.items())
    return Engine(
        "+".join(distinct),
        run,
        first.precision,
        "; ".join(engine.description for engine in distinct.values()),
        max(engine.error for engine in distinct.values()),
        reason=_joined(*(engine.reason for engine in distinct.values()), ranges),
        largest=others[-1].largest,
        memory_bytes=sum(engine.memory_bytes for engine in distinct.values()),
    )


def _compared(built: Mapping[str, Engine], probe: Probe, batches: Sequence[int]) -> Seconds:
    """Return the seconds of the compared batch sizes."""
    seconds: Seconds = {name: {} for name in built}
    for batch in batches:
        for _ in range(2):  # alternating, as another process may take the cores for a while
            for name, engine in built.items():
                taken = probe.seconds(engine.run, batch)
                seconds[name][batch] = min(taken, seconds[name].get(batch, math.inf))
        if max(found[batch] for found in seconds.values()) > _SLOW_S:
            break
    return seconds


def _described(name: str, seconds: Mapping[int, float]) -> str:
    times = " and ".join(
        f"{1e3 * taken / batch:.3g} ms at batch {batch}" for batch, taken in seconds.items()
    )
    return f"{name} takes {times} an image"


def _joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)
