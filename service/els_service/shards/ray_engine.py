"""Shards as actors of a Ray cluster, one a shard, spread over its nodes."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from els_service.errors import LoadError
from els_service.shards.messages import Array, Message, numbered, parse
from els_service.shards.part import PartSpec
from els_service.shards.ray_actor import ShardActor
from els_service.shards.shard import ShardLostError, ShardOptions, error_of

_log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 256 << 20
"""Of a cluster that the server starts: messages pass through it, banks do not."""
_ENVIRONMENT = {
    # Ray reports usage over the network.
    "RAY_USAGE_STATS_ENABLED": "0",
    # It starts a cluster of its own when it is asked after its end, by a thread that watches say.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # It gives its workers the priority of nice 15, so that shards starve beside other work.
    "RAY_worker_niceness": "0",
}
"""Variables for Ray, which reads them when it is imported and when a cluster is started."""
_POLL_S = 0.5
_LEAST_SHARE = 0.01
"""Share of a core that counts as progress of a shard."""


def load_ray() -> Any:
    """Return Ray.

    Raises:
        LoadError: It is not installed; names the extra.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ModuleNotFoundError as error:
        expected = "expected Ray: pip install 'els-denoise[server,ray]'"
        raise LoadError("engine", f"{expected}, got no module {error.name}") from error
    return ray


class RayCluster:
    """Connection to a cluster, one for the process.

    Args:
        options: settings of the server.

    Raises:
        LoadError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, options: ShardOptions) -> None:
        self._ray, self._options = load_ray(), options
        if not self._ray.is_initialized():
            self._connect(options.ray_address)

    @property
    def nodes(self) -> int:
        """Number of living nodes."""
        return sum(bool(node["Alive"]) for node in self._ray.nodes())

    def start(self, specs: list[PartSpec]) -> Sequence[RayShard]:
        """Return actors that load these parts, spread over the nodes.

        Raises:
            LoadError: The cluster has too few CPUs.
        """
        group = self._ray.util.placement_group(
            [{"CPU": spec.threads} for spec in specs], strategy="SPREAD"
        )
        if not group.wait(self._options.load_s):
            self._ray.util.remove_placement_group(group)
            cpus = sum(spec.threads for spec in specs)
            expected = f"expected a cluster with {cpus} free CPUs for {len(specs)} shards"
            raise LoadError("engine", f"{expected}, got {self._ray.available_resources()}")
        place = _Placement(self._ray, group, len(specs))
        return [RayShard(place, i, spec, self._options) for i, spec in enumerate(specs)]

    def _connect(self, address: str) -> None:
        common = {"log_to_driver": False, "configure_logging": False, "namespace": "els-denoise"}
        own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        try:
            if address == "auto":
                try:
                    self._ray.init(address="auto", **common)
                    return
                except ConnectionError:
                    address = "local"
            self._ray.init(address=address, **common, **(own if address == "local" else {}))
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise LoadError("engine", f"ray_address {address}: {reason}") from error


class _Placement:
    """Placement group of the shards of a bank, removed with the last of them."""

    def __init__(self, ray: Any, group: Any, shards: int) -> None:
        self.ray, self.group, self._left = ray, group, shards
        self._lock = threading.Lock()

    def release(self) -> None:
        """Give up the place of one shard."""
        with self._lock:
            self._left -= 1
            if self._left or not self.ray.is_initialized():
                return
        self.ray.util.remove_placement_group(self.group)


class RayShard:
    """Actor with a part of a bank, and the thread that watches it.

    Ray starts it again when it or its node dies.

    Args:
        place: where the shards of the bank are.
        index: of the shard.
        spec: what it loads.
        options: settings of the server.
    """

    def __init__(
        self, place: _Placement, index: int, spec: PartSpec, options: ShardOptions
    ) -> None:
        self.name, self._place, self._options = str(index), place, options
        self._ray = place.ray
        self.restarts, self.reason, self.pid = 0, "", 0
        self.sums: Future[Array] = Future()
        """Sums of its blocks, [K, 1 + C]; fails with what the first load failed with."""
        self._centre = b""
        self._ready, self._closed = threading.Event(), threading.Event()
        self._silent_s, self._seen = 0.0, (0, 0.0)
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            place.group, placement_group_bundle_index=index
        )
        actor = self._ray.remote(
            num_cpus=spec.threads,
            max_restarts=-1,
            max_task_retries=0,
            concurrency_groups={"control": 2},
            scheduling_strategy=strategy,
        )(ShardActor)
        self._actor = actor.remote(spec.fields)
        self._thread = threading.Thread(target=self._watch, name=f"els-ray-{index}", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether its slice is loaded and it can be asked."""
        return self._ready.is_set()

    def ask(self, operation: Message) -> Future[Message]:
        """Return the future answer of an operation; see ``Shard``."""
        if self._ready.is_set():
            return self._send(operation)
        answer = Future[Message]()
        answer.set_exception(ShardLostError(self._lost()))
        return answer

    def stop(self, number: int) -> None:
        """Stop an operation between two tiles."""
        self._actor.stop.options(concurrency_group="control").remote(number)

    def keep(self, centre: Array) -> None:
        """Pack the bank about its centre after every restart."""
        self._centre = centre.tobytes()

    def close(self) -> None:
        """End the process."""
        if not self._closed.is_set():
            self._closed.set()
            if self._ray.is_initialized():
                self._ray.kill(self._actor)
            self._place.release()

    def _lost(self) -> str:
        return f"shard {self.name} is not ready{self.reason and ': '}{self.reason}"

    def _send(self, message: Message) -> Future[Message]:
        """Return the future answer of the actor, ready or not."""
        answer = Future[Message]()

        def take(done: Future[bytes]) -> None:
            error = done.exception()
            if error is not None:
                # A dead actor or node: what it is called differs.
                # Not ready before its caller wakes, who would ask it at once.
                self._lose(_short(error))
                answer.set_exception(ShardLostError(f"shard {self.name}: {_short(error)}"))
                return
            found = parse(done.result())
            if found.op != "failure":
                answer.set_result(found)
            elif found.fields["kind"] == "lost":
                self._lose(found.fields["text"])
                answer.set_exception(ShardLostError(self._lost()))
            else:
                answer.set_exception(error_of(found))

        self._actor.answer.remote(message.frame, self._centre).future().add_done_callback(take)
        return answer

    def _lose(self, reason: str) -> None:
        if self._ready.is_set() and not self._closed.is_set():
            self._ready.clear()
            _log.warning("shard lost", extra={"shard": self.name, "reason": reason})
        self.reason = reason

    def _watch(self) -> None:
        """Ask the actor for its state, until the shard is closed."""
        while not self._closed.is_set():
            began = time.monotonic()
            try:
                state = self._ray.get(
                    self._actor.state.options(concurrency_group="control").remote(),
                    timeout=4 * _POLL_S,
                )
            except self._ray.exceptions.GetTimeoutError:
                self._silence(4 * _POLL_S)
            except Exception as error:
                # Ray has many classes for a dead actor; the next one to answer is another.
                self._lose(_short(error))
                self._closed.wait(_POLL_S / 5)
            else:
                self._take(state)
                self._closed.wait(max(0.0, _POLL_S - (time.monotonic() - began)))

    def _take(self, state: dict[str, Any]) -> None:
        seen = state["progress"], state["cpu_s"]
        moved = seen[0] != self._seen[0] or seen[1] - self._seen[1] > _LEAST_SHARE * _POLL_S
        if moved or not state["busy"]:
            self._silent_s, self._seen = 0.0, seen
        else:
            self._silence(_POLL_S)
        if state["pid"] == self.pid and (self._ready.is_set() or not self.sums.done()):
            return
        self.restarts += self.pid not in (0, state["pid"])
        self.pid = state["pid"]
        if state["fault"]:
            self.reason = state["fault"]
            if not self.sums.done():
                self.sums.set_exception(ShardLostError(self._lost()))
            return
        if not self.sums.done():
            sums = self._send(numbered("sums"))
            sums.add_done_callback(self._take_sums)
        else:
            # Packs the bank, too: ready means that a question is answered at once.
            again = self._send(numbered("ready"))
            again.add_done_callback(self._take_again)

    def _take_sums(self, done: Future[Message]) -> None:
        error = done.exception()
        if self.sums.done():
            return
        if error is None:
            self._take_again(done)
            self.sums.set_result(done.result().arrays[0])
        else:
            self.sums.set_exception(error)

    def _take_again(self, done: Future[Message]) -> None:
        if done.exception() is None:
            self.reason = ""
            self._ready.set()

    def _silence(self, passed_s: float) -> None:
        """Count time without progress; end a process that has had none for too long."""
        self._silent_s += passed_s
        limit_s = self._options.stall_s if self._ready.is_set() else math.inf
        if self._silent_s < limit_s:
            return
        self._silent_s = 0.0
        self._lose(f"it made no progress for {limit_s:g} s")
        self._ray.kill(self._actor, no_restart=False)


def _passed_on(source: Future[Message], target: Future[Message]) -> None:
    def take(done: Future[Message]) -> None:
        error = done.exception()
        if target.done():
            return
        if error is not None:
            target.set_exception(error)
        else:
            target.set_result(done.result())

    source.add_done_callback(take)


def _short(error: BaseException) -> str:
    """Return the first line of an error of Ray, whose texts are pages."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
